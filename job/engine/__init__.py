"""The mechanics of any run: folder, resume, gradients, comparison of the workers.

Shape letters: N workers, b images of a micro-batch or of a pass without training, C channels, H
height, W width, D values in all running statistics of a model, n of the items that the docstring
names.

Terms:
    worker              one process of the job; its rank is its number, from 0
    collective          a call that all workers must make
    position            (epoch, step), both from 0
    batch               the images of a step on one worker; the total batch has those of all workers
    micro-batch         the images that pass through the networks at a time
    running statistics  the running means and variances of batch norm
"""
