"""What is happening: the run of a recipe on a model, its record, masks, coverage and snapshots."""
