"""Weight-only quantized linear layers (W2-W4 and W5-W8, 16-bit or fp32 activations).

``naive`` is the specification, ``kernel`` the Triton kernels, ``launch`` their launches, ``op`` the operator
``hf_optim::wna16``, ``layer`` the packed weight, ``cpu`` its form on PyTorch's own packed operators, ``bench`` the
contenders of ``hf-optim bench``. Apart from these, ``decode`` converts codes to numbers, mostly in inline assembly.
"""
