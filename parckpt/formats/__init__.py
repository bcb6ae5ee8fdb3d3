"""Arrays to header and segments, and back. No I/O: bytes and buffers in, bytes and buffers out."""
