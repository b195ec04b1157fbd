"""What a technique offers for its result: ``Kernel``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..weights import QuantizedWeight


@dataclass(frozen=True)
class Kernel:
    """A faster way to run some linear layers, on their compressed weights alone.

    Attributes:
        name: of the kernel, for messages.
        serves: ``weight -> None`` where the kernel can run a layer of that weight and it pays, else the reason why not
            (a phrase); the empty string where such a weight is not its business at all. It looks at the description
            only, not at the codes.
        bind: makes the *packed weight* of a weight, an ``nn.Module`` with the weight in the kernel's own layout, as
            buffers:

            - ``forward(x)``: ``[..., in] -> [..., out]`` in the dtype of ``x``, bias included; any number of rows;
              differentiable in ``x``;
            - ``accepts(x) -> bool``: whether dtype and device fit; where they do not, the layer decodes its weight;
            - ``codes() -> Codes``: the codes it was made of, bit by bit (saving, ``restore`` and every fallback need
              them);
            - ``label``: what ``report`` prints;
            - ``bias``: where it keeps the bias, a buffer of that name, so that the layer can share its own;
            - ``renew()``, if it has one, is called when that buffer has become another tensor;
            - ``fuse(norm, packed weights)``, if it has one: ``norm`` feeds these packed weights (of one class, this
              among them) and no other linear layer. It returns ``(norm, x) -> output``, which is asked before the
              norm's own forward and may leave for the packed weights what they need of ``x`` (its codes); it gives None
              where the norm had better compute by itself. Or it returns None.

            It can be copied (no closures). ``prepack`` may raise ``ValueError`` with the reason why it cannot.
        sparse24: whether it is to be asked for 2:4 sparse weights, quantized or not (``kind == "dense"``). The pattern
            is looked for only if some kernel asks. Such a kernel is asked first for the weights that have it.
        outliers: whether it computes outlying columns of the input apart (``QuantizedWeight.outliers``). Such a kernel
            is asked first for the weights that are meant for it, and for no others.
        coded: whether ``supports`` and ``prepack`` take a module of remote code that holds codes (see
            ``packed.codebook``) instead of a weight. The ``codes()`` of its packed weight are uint8 ``[out, in]``, and
            none of its buffers is persistent. Such a kernel must refuse anything else with the empty string.
        join: makes one packed weight of several, whose output is theirs side by side: layers that read the same tensor
            (q, k and v) then run as one product. Its ``codes()`` are theirs one after the other, bit by bit, and so is
            its ``bias`` (either all have one or none). None where they differ in more than their rows. The packed
            weights given are not used any more afterwards.
    """

    name: str
    supports: Callable[[QuantizedWeight], str | None]
    prepack: Callable[[QuantizedWeight], Any]
    sparse24: bool = False
    outliers: bool = False
    codebook: bool = False
    join: Callable[[list[Any]], Any] | None = None
