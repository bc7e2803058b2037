"""Export a checkpoint's student without its head, as a file that other programs load.

app.py has the command, network.py what is exported. A format is a file with `write` and `load`
and a line in formats.py.
"""

from job.export.app import export, main

__all__ = ["export", "main"]
