"""Find runs and read their folders."""
