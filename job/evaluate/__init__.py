"""The quality of frozen features: k-NN and a linear classifier.

Letters of shapes: B images of a batch, C features of an image, H height, W width, m validation
images, n images of a block or group, N workers, k neighbours of an image.
"""
