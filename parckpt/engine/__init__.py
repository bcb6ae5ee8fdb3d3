"""Where the layers meet: saving, publishing, restoring."""
