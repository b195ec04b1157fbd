"""Linear layers whose weight is codes of one small codebook, with a few outliers as they are.

``naive`` is the specification, ``kernel`` the Triton kernels, ``lookup`` how codes become numbers in them, ``run``
their launches, ``op`` the operator ``hf_optim::codebook_linear``, ``layer`` what a model is bound to.
"""
