"""The programs: training, and the programs around it.

Shape letters of the modules in this folder: N workers, B images of a worker's batch, b images of a
micro-batch, H height, W width, C features of an image, D values in all running statistics of a
model, k top classes. Each package has its own letters in its `__init__.py`.
"""

__version__ = "0.1.0"  # a release needs the same in pyproject.toml, CITATION.cff, CHANGELOG.md
