"""The quality of frozen features: k-NN and a linear classifier."""
