"""A run's output: records, log lines, event files, callbacks and signs of collapse.

Shape letters: B images of a worker's batch, b images of a micro-batch, n vectors, d dimensions of
an embedding, S student channels, T teacher channels, C channels of either network, G teacher
channels matched to each student channel, H x W or h x w height and width.

record: a line of metrics.jsonl, with a kind (job/metrics/schema.py).
log line: a line on the screen and in log.txt.
position: the (epoch, step) to which a record belongs, both counted from 0.
tag: the name of a curve in TensorBoard and in trackers.
tracker: Weights & Biases or MLflow.
"""
