"""The sweep: every architecture of the installed transformers, tiny, through the recipes that most people use.

``python -m hf_optim.testing.sweep`` builds each class that transformers lists under the auto classes of text, vision,
speech and multimodal models from its smallest configuration, compresses it, saves it, and loads it twice: with stock
transformers and with ``optim_config="auto"``. The result of each class and recipe stands in ``docs/architectures.md``.
"""
