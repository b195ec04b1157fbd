"""The kernels of installed packages, from the entry-point group ``hf_optim.kernels``.

The value of an entry point is a module with the attributes of ``KernelModule``::

    [project.entry-points."hf_optim.kernels"]
    wna16 = "hf_optim_kernels.wna16.layer"

The modules are imported when the first model of the process is accelerated. No technique is imported for it.
"""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import entry_points

from ...trust.bounds import first_line
from .kernel import Kernel, KernelModule
from .packed_linear import KernelWarning

GROUP = "hf_optim.kernels"
BUNDLED = "hf_optim_kernels."
OPTIONAL = ("join", "supports_experts", "prepack_experts", "runs_as")


@functools.cache
def installed_kernels() -> tuple[Kernel, ...]:
    """Return the kernels of all installed packages: those of other packages, by name, before the bundled ones.

    An entry point that cannot be loaded is skipped with one ``KernelWarning``, which names it and the error.
    """
    found: list[Kernel] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.value.startswith(BUNDLED), e.name)):
        try:
            kernel = kernel_of(entry.load())
        except Exception as error:
            text = f"the kernel {entry.name} ({entry.value}) is skipped: {first_line(error, typed=True)}"
            warnings.warn(text, KernelWarning, stacklevel=2)
            continue
        if kernel not in found:
            found.append(kernel)
    return tuple(found)


def kernel_of(module: KernelModule) -> Kernel:
    """Return the ``Kernel`` that a module describes.

    Raises ``AttributeError`` if a required attribute is missing, ``TypeError`` if one has the wrong type.
    """
    kernel = Kernel(
        module.NAME,
        supports=module.supports,
        prepack=module.prepack,
        sparse24=getattr(module, "SPARSE24", False),
        outliers=getattr(module, "OUTLIERS", False),
        codebook=getattr(module, "CODEBOOK", False),
        **{name: getattr(module, name, None) for name in OPTIONAL},
    )
    if not isinstance(kernel.name, str):
        raise TypeError(f"NAME is a {type(kernel.name).__name__}, not a str")
    for name in ("supports", "prepack", *OPTIONAL):
        value = getattr(kernel, name)
        if not callable(value) and (value is not None or name not in OPTIONAL):
            raise TypeError(f"{name} is a {type(value).__name__}, not a function")
    return kernel
