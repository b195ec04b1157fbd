"""Calibrate: drive techniques over batches, the whole model at once or block by block."""
