"""Hadamard transforms of rows, block by block, and the same with the row quantized to int8 in one pass.

``naive`` is the specification, ``kernel`` the Triton kernel, ``launch`` its launches, ``op`` the operators
``hf_optim::hadamard`` and ``hf_optim::hadamard_int8``, ``layer`` what a module of a checkpoint calls, ``cpu`` the same
on a CPU, ``bench`` the contenders of ``hf-optim bench``.
"""
