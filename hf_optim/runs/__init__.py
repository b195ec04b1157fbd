"""The run of a recipe on a model: its state, record, masks, coverage and snapshots."""
