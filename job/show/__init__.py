"""Tools that show runs from their folders: in a terminal (watch) and in a report.

Shape letters: H, W: height and width of an image or a feature map. S, T: student's and teacher's
channels of a stage. G: teacher channels matched to a student channel. C: width of a feature
vector. m: images with features. n: items that the docstring names. In addition, K: keys in MoCo's
queue, k: neighbours.

Source: a run's folder, or the log of a SLURM job whose run has not started. Label: a run's name
in a report. Try: a start of a SLURM job. Sign: a number that shows collapse.
"""
