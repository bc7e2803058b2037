"""The programs: training, and what stands around it."""
