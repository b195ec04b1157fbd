"""Sparse feed-forward layers: a controller picks one unit of each block, and few tokens read the chosen rows alone.

``naive`` is the specification, ``kernel`` the Triton kernels, ``launch`` their launches and tiles, ``op`` the operator
``hf_optim::sparse_ffn``, ``layer`` what a module of a checkpoint calls, ``cpu`` the same on a CPU, ``bench`` the
contenders of ``hf-optim bench``.
"""
