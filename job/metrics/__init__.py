"""Records, log, event files, signs of collapse and hints."""
