"""The signs of collapse (job/metrics/collapse.py) beyond which a student collapses; apart, for those who look without Horovod."""

# Measured on ResNet-18: in its first steps a student falls to 0.2 to 0.4 of deviation and 2 to 10 of rank, as its keys lag
# behind, and rises again. On the digits at a rate a hundred times too high it falls to 0.03 and 1.0 and stays, at one ten
# times too high to 0.1 and 1.5, and learns little; a ResNet-50 has 0.09 and 1.5 in its first two epochs at the right rate.
# One whose head gives one vector has 0.00 and 1.00. None of them has dead channels.
STD, RANK, DEAD = 0.05, 1.1, 0.5
