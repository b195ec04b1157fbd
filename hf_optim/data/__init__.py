"""Inputs: datasets, token sequences, calibration sets, labelled batches."""
