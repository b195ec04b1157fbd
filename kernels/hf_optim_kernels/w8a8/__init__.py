"""Linear layers with 8-bit weights and 8-bit inputs: int8 or float8 (e4m3), quantized on the fly or beforehand.

``naive`` is the specification, ``kernel`` the Triton kernel for few rows, ``launch`` the launches, ``op`` the
operators, ``layer`` the packed weight, ``cpu`` its form on a CPU, ``bench`` the contenders of ``hf-optim bench``. Apart
from these, ``gemm`` has the kernels for many rows, ``tiles`` the configurations of both, and ``sweep`` checks and times
them.
``quantize`` has the kernels that quantize rows, ``epilogues`` their operators, plain or as the epilogue of an RMSNorm,
LayerNorm or gated activation, and ``norm_fusion`` attaches them to the norms of a model.
"""
