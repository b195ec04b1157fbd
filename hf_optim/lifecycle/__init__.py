"""The state machine: ``from_pretrained``, ``optimize``, and the stages of a run."""
