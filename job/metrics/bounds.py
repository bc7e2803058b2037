"""The bounds of the signs of collapse (job/metrics/collapse.py), without imports.

Measured on ResNet-18. In its first steps a student falls to a spread of 0.2 to 0.4 and a rank of
2 to 10, because its keys lag behind, and rises again. On the digits, with a rate a hundred times
too high, it falls to 0.03 and 1.0 and stays there. With a rate ten times too high, it falls to 0.1
and 1.5, and learns little. A ResNet-50 has 0.09 and 1.5 in its first two epochs at the right rate.
A student whose head outputs one constant vector has 0.00 and 1.00. None of them has dead channels.
"""

# A student has collapsed if feature_std < STD, queue_rank < RANK or dead_layerN > DEAD.
STD, RANK, DEAD = 0.05, 1.1, 0.5
