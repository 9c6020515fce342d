"""What a run holds between its first and its last step."""
