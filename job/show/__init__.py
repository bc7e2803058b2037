"""Tools that show runs from their folders: in a terminal (watch) and in a report."""
