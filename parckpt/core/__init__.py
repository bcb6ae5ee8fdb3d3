"""The pure part: no MPI, disk, clock, threads or environment."""
