"""LLM.int8() (2208.07339): int8 products of all but the outlier columns of the input, which keep the input's dtype.

``naive`` is the specification, ``kernel`` the Triton kernels for few rows, ``launch`` their launches, ``op`` the
operator ``hf_optim::llm_int8``, ``layer`` the packed weight, ``cpu`` its product on a CPU, ``bench`` the contenders of
``hf-optim bench``. Apart from these, ``gemm`` has the kernels for many rows, a different algorithm, and ``tiles`` the
configurations of both.
"""
