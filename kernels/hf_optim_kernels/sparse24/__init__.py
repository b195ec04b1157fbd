"""Linear layers whose weight keeps two of every four columns (2:4), stored compressed, with 16-bit inputs.

``naive`` is the specification, ``kernel`` and ``device`` the Triton kernels, ``configs`` their tiles, ``library`` the
matrix product of cuSPARSELt for many rows, ``op`` the operator ``hf_optim::sparse24``, ``layer`` what a model is
bound to.
"""
