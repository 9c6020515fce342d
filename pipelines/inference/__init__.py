"""Inputs -> masks -> shards."""
