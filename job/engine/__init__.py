"""The machinery of any run: state, resume, gradients, comparison of workers.

N: workers. b: images of a batch. C: channels. D: values of all running statistics of a model.
worker: a process of the job, by its rank. collective: a call that all workers must make.
"""
