"""Images for people: arrays in, PIL images out; no files, no model."""
