"""The life of a run: ``from_pretrained`` and ``optimize``, its stages, and the quantizer interface of optimum."""
