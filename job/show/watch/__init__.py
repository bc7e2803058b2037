"""Show runs on a terminal."""
