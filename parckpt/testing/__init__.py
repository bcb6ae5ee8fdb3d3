"""Manual clock, memory and faulty file systems, N ranks in threads. Nothing in parckpt imports this."""
