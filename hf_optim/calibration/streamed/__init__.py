"""The streamed driver: a checkpoint is compressed block by block, and the model is never whole in memory.

``skeleton`` builds the model without weights, ``reader`` reads tensors out of the shards, ``residence`` makes a part of
the model real and weightless again, ``activations`` holds what flows between the blocks, ``arguments`` knows what a
block is called with, ``output`` writes finished shards and knows which are finished, ``driver`` puts these together,
and ``job`` is what ``hf-optim compress --driver streamed`` calls.
"""
