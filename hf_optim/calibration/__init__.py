"""Calibration: run techniques over calibration batches, on the whole model at once or block by block."""
