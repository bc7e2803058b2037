"""A run's checkpoints, their checksums, and the files of other programs.

Terms:
    position      (epoch, step), both from 0
    seal          the SHA-256 at the end of a checkpoint
    foreign file  a file that another program saved
    layout        where a file has a network, and how it names the network's tensors
    prefix        the first part of a tensor's name, before the network's own names
    body          a network without its head; a Backbone is one that was read from a file
    head          the layers that its training put on top, such as a projector
    digest        the first 16 hex digits of a SHA-256
"""
