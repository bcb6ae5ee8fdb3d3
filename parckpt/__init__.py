"""Checkpoints of parallel training jobs: saved by MPI ranks, published atomically, restored on any number of them."""
