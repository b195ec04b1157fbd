"""A plugin of pytest: the interpreter refuses the products that the compiler refuses.

Triton's interpreter multiplies blocks of any size. A tensor core sums over 16 terms or more, of 8 bits over 32, and the
compiler ends with an error below; it then fails on the first GPU, for the one shape that makes a block small.
"""

from __future__ import annotations

import os


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import min_dot_size
        from triton.runtime.interpreter import interpreter_builder
    except ImportError:  # without Triton, or with one for other devices, nothing is compiled for these
        return
    interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))
