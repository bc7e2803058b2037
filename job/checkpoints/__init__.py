"""A run's checkpoints, their checksums, and the files of other programs.

position: (epoch, step), both from 0. seal: the SHA-256 at the end of a checkpoint.
own checkpoint: one that this program saved. foreign file: a file that another program saved.
"""
