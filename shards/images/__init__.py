"""Image files: validated on open, decoded to arrays."""
