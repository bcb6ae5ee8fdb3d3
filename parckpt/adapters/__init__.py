"""Frameworks' arrays and networks as leaves and states. One module per framework, which is never imported by it."""
