"""The parts of any run: state, resume, gradients, comparison of workers."""
