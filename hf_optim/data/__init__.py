"""Inputs: datasets, token windows, calibration sets, labelled batches."""
