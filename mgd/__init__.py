"""Matching Guided Distillation (arXiv 2008.09958): mathematics on tensors, with no launcher and no files."""
