"""Images from a folder, their views, and the random numbers that make them."""
