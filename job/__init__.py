"""The programs: training, and the programs around it."""

__version__ = "0.1.0"  # a release needs the same in pyproject.toml, CITATION.cff, CHANGELOG.md
