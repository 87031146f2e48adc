"""Our step and our reading, timed beside those of others."""
