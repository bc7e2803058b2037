"""Workers and nodes: launch, collectives, signals, memory.

Shape letters: n rows of one worker, a number that can differ between workers.

Terms:
    worker      one process of the job, on one GPU or on a CPU
    rank        the number of a worker, from 0. Its local rank counts the workers of its node
    launcher    the program that starts the workers: horovodrun, mpirun or srun
    task        a process that the launcher has started: a worker, once Horovod has connected it
    collective  an operation that all workers must call
    rendezvous  the server of rank 0 at which the ranks meet before Horovod starts
    nonce       a random number that is used once, so that no proof of a key can be used again
    interface   a network interface of a node, such as eth0
    device      the GPU or CPU on which a worker computes
"""
