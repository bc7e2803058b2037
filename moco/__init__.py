"""Momentum Contrast (arXiv 1911.05722, 2003.04297) across Horovod workers."""
