"""Zero many tensors where masks are False, in one launch: it keeps pruned weights at zero during training.

``naive`` is the specification, ``kernel`` the Triton kernel, ``launch`` builds the tables of addresses it reads. It has
no ``op``: autograd does not record the call, and it is not compiled.
"""
