"""Files: read, write and replace checkpoints, on disk and on the Hub."""
