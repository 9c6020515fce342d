"""Folders of images and masks: paired, split, separated."""
