"""Images, their random views, and the loader processes that prepare batches of them.

Shape letters: B images of a worker's batch, H height, W width, D length of a vector, n any number.
An image is a uint8 array (H, W, 3), a view a uint8 tensor (3, H, W). Its appearance is the row of
numbers (12,) for its colours, blur and flip. A draw is the index of an item of a dataset. A lane
is a position of a batch that reads tar shards in sequence.
"""
