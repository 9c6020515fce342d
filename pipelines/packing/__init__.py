"""Folders and foreign tars -> checked samples -> shards."""
