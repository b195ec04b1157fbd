"""Weight-only quantized linear layers (W2-W4 and W5-W8, 16-bit or fp32 activations).

``naive`` is the specification, ``kernel`` the Triton kernel, ``op`` the operator ``hf_optim::wna16``, ``cpu`` PyTorch's
own packed operators, ``layer`` what a model is bound to.
"""
