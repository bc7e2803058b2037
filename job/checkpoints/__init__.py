"""Checkpoints: a run's folder of them, their checksums, and other programs' files."""
