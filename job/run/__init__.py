"""One run on these workers: launcher, folder, log, checkpoints and the wish to stop."""
