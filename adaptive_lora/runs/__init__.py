"""A recipe in, a run directory out; a finished run at work."""
