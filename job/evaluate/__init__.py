"""The quality of frozen features: k-NN and a linear classifier.

Shape letters: N workers, B images of a worker's batch, C features of an image, H height, W width,
m validation images, n images of a block or group, k neighbours of an image, b any number of images.
A group is the images of one forward pass, a row the features of one image.
"""
