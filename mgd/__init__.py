"""Matching Guided Distillation (arXiv 2008.09958) on tensors, without a launcher or files.

Shape letters: B images, S student channels, T teacher channels, C channels of either network,
H x W map size, P = H W positions of a map, R = B H W positions of all images, G teacher channels
matched to each student channel.

matching: (G, S) int64. Column a lists the teacher channels that student channel a imitates.
margin: a channel's expected negative response. A student below it is not penalised.
reducer: reduces T teacher channels to S target channels by the matching.
loss factor: divisor of the distillation loss.
"""

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
