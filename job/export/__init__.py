"""Export a checkpoint's student without its head, as a file that other programs load.

app.py has the command, network.py the exported network. A format is a file with `write` and `load`
and a line in formats.py. The origin of an exported file is its checkpoint, program and options. A
companion is a further file in the folder of the first: the model card, or timm's configuration.
Shape letters: B images, C features, H height, W width.
"""

from job.export.app import export, main

__all__ = ["export", "main"]
