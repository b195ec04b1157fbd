"""Linear layers whose weight is codes of one small codebook, with a few outliers stored as numbers.

``naive`` is the specification, ``kernel`` the Triton kernels, ``launch`` their launches, ``op`` the operator
``hf_optim::codebook_linear``, ``layer`` the packed weight, ``bench`` the contenders of ``hf-optim bench``. Apart from
these, ``lookup`` converts codes to numbers, mostly in inline assembly. It has no ``cpu``: a CPU decodes the weight.
"""
