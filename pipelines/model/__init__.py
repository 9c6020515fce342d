"""The network: built, loaded, run, exported."""
