"""Linear layers with 8-bit weights and 8-bit inputs: int8 or float8 (e4m3), quantized on the fly or beforehand.

``naive`` is the specification, ``quantize`` the kernels that quantize a row (plain, or fused with what makes the row:
RMSNorm, LayerNorm, a gated activation), ``kernel`` and ``gemm`` the products for few and for many rows, ``tiles`` their
shapes, ``op`` the operators, ``layer`` what a model is bound to.
"""
