"""The streamed driver: compress a checkpoint block by block, without ever holding the whole model in memory.

``checkpoints.meta_model`` builds the model on the meta device and ``checkpoints.reader`` reads tensors from the shards.
In this package, ``materialize`` loads parts of the model and offloads them again, ``activations`` and
``activation_store`` hold the activations between blocks, ``block_arguments`` records how blocks are called, ``output``
writes completed blocks and reads them back (with ``decode`` and ``finished_model``), and ``driver`` ties these
together. ``cli.jobs.streamed`` is what ``hf-optim compress --driver streamed`` calls.
"""
