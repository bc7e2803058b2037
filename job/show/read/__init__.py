"""Read a run's folder."""
