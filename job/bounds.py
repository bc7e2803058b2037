"""The signs of collapse (job/collapse.py) beyond which a student collapses; apart, for those who look without Horovod."""

# Measured on ResNet-18: in its first steps a student falls to 0.2 to 0.4 of deviation and 2 to 10 of rank, as its keys lag
# behind, and rises again; at a rate ten times too high to 0.03 and 1.1, where its loss is that of guessing; one whose head
# gives one vector has 0.00 and 1.00. Neither has dead channels.
STD, RANK, DEAD = 0.05, 1.1, 0.5
