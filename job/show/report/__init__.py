"""Draw runs on an HTML page."""
