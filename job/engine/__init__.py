"""The mechanics of any run: folder, resume, gradients, comparison of the workers.

Shapes: N is the number of workers, b of images in a batch, C of channels, n of tensors, and D of
values in all running statistics of a model. H and W are the height and width of an image.

Terms:
    worker              one process of the job; its rank is its number, from 0
    collective          a call that all workers must make
    position            (epoch, step), both from 0
    batch               the images of a step on one worker; the total batch has those of all workers
    micro-batch         the images that pass through the networks at a time
    running statistics  the running means and variances of batch norm
"""
