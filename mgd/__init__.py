"""Matching Guided Distillation (arXiv 2008.09958): mathematics on tensors, with no launcher and no files."""

from mgd.assignment import assign
from mgd.cost import channel_cost
from mgd.distiller import MGDistiller
from mgd.loss import partial_l2
from mgd.margin import margin_from_bn
from mgd.pooled import PooledMatching, pooled_cost, pooled_sums
from mgd.reducers import REDUCERS

__all__ = [
    "REDUCERS",
    "MGDistiller",
    "PooledMatching",
    "assign",
    "channel_cost",
    "margin_from_bn",
    "partial_l2",
    "pooled_cost",
    "pooled_sums",
]
