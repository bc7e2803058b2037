"""How the workers start, and what they send each other."""
