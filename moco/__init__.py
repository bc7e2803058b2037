"""Momentum Contrast (arXiv 1911.05722, 2003.04297) across workers.

Shape letters: N workers, B images of a worker's batch, NB images of the total batch, b images of a
micro-batch, H height, W width, K negatives in the queue, dim features of a key, n keys to enqueue.

T: temperature of the softmax. m: momentum of the key encoder.
query, key: features of the two views of an image, from the query encoder and the key encoder.
part: index of a micro-batch within a worker's batch.
position: index of an image in the total batch.
"""
