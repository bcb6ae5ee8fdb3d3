"""Ranks talking to each other: the only place that knows MPI."""
