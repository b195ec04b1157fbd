"""LLM.int8(): int8 products of all but the outlier columns of the input, which are multiplied in the input's type.

``naive`` is the specification (2208.07339), ``kernel`` the Triton kernels, ``run`` their launches, ``op`` the operator
``hf_optim::llm_int8``, ``layer`` the linear layer.
"""
