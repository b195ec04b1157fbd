"""Zeros where masks say so, in many tensors with one launch: what keeps pruned weights at zero through training.

``naive`` is the specification, ``kernel`` the Triton kernel, ``run`` the tables of addresses that it goes through.
Nothing here is recorded for autograd or compiled, so there is no ``torch.library`` operator.
"""
