"""What a run looks like, from its folder alone: on a terminal while it goes on, and in a report."""
