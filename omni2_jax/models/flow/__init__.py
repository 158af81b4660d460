"""Flow matching: speech units to mel frames, at once or in chunks."""
