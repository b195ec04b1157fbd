"""``Kernel``: a faster way to run compressed linear layers, and the module of a package that provides one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ...trust.bounds import first_line
from ..weights import QuantizedWeight

NO_KERNEL = "no kernel handles this kind of weight"

T = TypeVar("T")


@dataclass(frozen=True)
class Kernel:
    """A faster way to run linear layers directly on their compressed weights.

    Attributes:
        name: name of the kernel, for messages.
        supports: ``weight -> None`` if the kernel can run a layer with that weight faster than the dense product,
            otherwise the reason why not (a phrase); ``""`` if the kernel does not handle this kind of weight at all.
            ``supports`` reads the description only, not the codes.
        prepack: builds the *packed weight*, an ``nn.Module`` that holds the weight in the kernel's own layout, as
            buffers:

            - ``forward(x)``: ``[..., in] -> [..., out]`` in the dtype of ``x``, bias included; any number of rows;
              differentiable in ``x``;
            - ``accepts(x) -> bool``: True if dtype and device fit; if they do not, the layer decodes its weight;
            - ``codes() -> Codes``: the codes it was built from, bit-exact (saving, ``restore`` and every fallback need
              them);
            - ``label``: the text that ``report`` prints;
            - ``bias``: the buffer that holds the bias, so that the layer can share its own;
            - ``renew()`` (optional): called after that buffer has been replaced by another tensor;
            - ``fuse(norm, packed_weights)`` (optional): ``norm`` feeds these packed weights (all of one class, this one
              included) and no other linear layer. It returns ``(norm, x) -> output``, which is called before the norm's
              own forward and may leave for the packed weights what they need of ``x`` (its codes); that function
              returns None where the norm computes its output itself faster. Or it returns None.

            It must be copyable (no closures). ``prepack`` may raise ``ValueError`` with the reason why it cannot.
        sparse24: True for a kernel of 2:4 sparse weights, quantized or not (``kind == "dense"``). Weights are searched
            for the pattern only if a kernel has this flag. For weights with the pattern, such kernels come first.
        outliers: True for a kernel with outlier decomposition, which computes outlier columns of the input separately
            (``QuantizedWeight.outliers``). It is tried first for the weights that have a threshold, and for no others.
        codebook: True if ``supports`` and ``prepack`` take a codebook module of remote code (see ``codebook_layers``)
            instead of a weight. The ``codes()`` of its packed weight are uint8 ``[out, in]``, and none of its buffers
            is persistent. Such a kernel must return ``""`` for anything else.
        join: builds one packed weight from several, whose output is theirs side by side: layers that read the same
            tensor (q, k and v) then run as one product. Its ``codes()`` are theirs concatenated, bit-exact, and so is
            its ``bias`` (either all have one or none does). It returns None if they differ in more than their rows.
            The packed weights passed in are not used afterwards.
        supports_experts: ``supports`` for the experts of a mixture (``QuantizedExperts``), or None.
        prepack_experts: builds the packed form of experts, an ``nn.Module`` with ``accepts``, ``label`` and

            - ``forward(hidden, experts, weights, activation, norm)``: the output ``[T, d]`` of the mixture for hidden
              ``[T, d]``, the chosen experts int64 ``[T, k]`` (from E on: computed by none) and their weights
              ``[T, k]``; ``activation`` is applied between the products, ``norm`` (or None) behind them;
              differentiable in ``hidden`` and ``weights``;
            - ``codes(side, expert)``: as of ``QuantizedExperts``, bit-exact.
        runs_as: what ``report`` says before ``accelerate`` that a supported weight (or experts) would run on, where the
            name of the kernel would promise too much: the label of a packed weight that keeps a decoded weight. None
            says the name.
    """

    name: str
    supports: Callable[[QuantizedWeight], str | None]
    prepack: Callable[[QuantizedWeight], Any]
    sparse24: bool = False
    outliers: bool = False
    codebook: bool = False
    join: Callable[[list[Any]], Any] | None = None
    supports_experts: Callable[[Any], str | None] | None = None
    prepack_experts: Callable[[Any], Any] | None = None
    runs_as: Callable[[Any], str] | None = None

    def promise(self, weight: Any) -> str:
        """Return what ``report`` says that a supported weight, or supported experts, would run on."""
        try:
            return self.runs_as(weight) if self.runs_as is not None else self.name
        except Exception as error:
            return f"{self.name} ({first_line(error, typed=True)})"

    def check(self, weight: Any) -> str | None:
        """Return ``supports(weight)``. An error in it becomes the reason: a broken kernel disables only itself."""
        try:
            return self.supports(weight)
        except Exception as error:
            return first_line(error, typed=True)

    def check_experts(self, weight: Any) -> str | None:
        """Return ``supports_experts(weight)`` as ``check``; ``""`` if the kernel does not run experts."""
        if self.supports_experts is None or self.prepack_experts is None:
            return ""
        try:
            return self.supports_experts(weight)
        except Exception as error:
            return first_line(error, typed=True)


def first_that_takes(
    kernels: Iterable[Kernel], check: Callable[[Kernel], str | None], pack: Callable[[Kernel], T]
) -> tuple[Kernel, T] | str:
    """Return the first kernel that takes something with what ``pack`` makes for it, or the reasons why none does.

    Reasons are joined by ``;`` and empty if no kernel handles this kind of weight. An error of ``pack`` is a reason: a
    broken kernel disables only itself.

    Args:
        kernels: in the order to try them.
        check: returns None if a kernel takes it, else as ``Kernel.check``.
        pack: makes the packed weight for a kernel.
    """
    reasons = []
    for kernel in kernels:
        reason = check(kernel)
        if reason is None:
            try:
                return kernel, pack(kernel)
            except ValueError as error:
                reason = str(error)
            except Exception as error:
                reason = first_line(error, typed=True)
        if reason:
            reasons.append(f"{kernel.name}: {reason}")
    return "; ".join(reasons)


class KernelModule(Protocol):
    """A module that registers itself as a kernel, through an entry point of the group ``hf_optim.kernels``.

    Its attributes are the fields of ``Kernel``. Optional: ``join``, ``supports_experts``, ``prepack_experts``,
    ``runs_as``, and the flags ``SPARSE24``, ``OUTLIERS`` and ``CODEBOOK`` (False where absent).
    """

    NAME: str

    def supports(self, weight: Any, /) -> str | None:
        """See ``Kernel.supports``."""
        ...

    def prepack(self, weight: Any, /) -> Any:
        """See ``Kernel.prepack``."""
        ...
