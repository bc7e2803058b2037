"""The study: whether a matched student learns better features than the same student alone."""
