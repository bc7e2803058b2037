"""Compare runs on an HTML page."""
