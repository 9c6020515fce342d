"""Mask files: declared formats in, class indices out."""
