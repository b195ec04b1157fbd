r"""GOBO: one small codebook per layer; the few weights outside the layer's Gaussian are stored unquantized.

With mean m and standard deviation s of the weights of a layer, a weight is an outlier (2005.03842, section IV) if::

    log p(w) = -(w - m)^2 / (2 s^2) - log(s sqrt(2 pi)) < threshold

log is natural and p the density, in 1 / unit of the weight, as in the paper. The other weights, the paper's G group,
are assigned to 2^bits centroids: first the means of bins of equal population, then, while ``sum |w - c(w)|`` falls,
every weight goes to the nearest centroid and every centroid to the mean of its weights. The set with the least sum is
kept.

Nothing is trained and no data is used. The paper keeps outliers in fp32; here they have the model's dtype. A layer
holds, in memory and on disk: ``bits`` bits per weight without gaps, the centroids, and for every outlier its value and
its column (with a count per row), for which the paper uses 32 bits and a position in its group of weights. The paper
also codes the table of the word embedding, which stays as it is here unless ``embedding_bits`` is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_optim import ModelError, Paper, Reload, Technique, compressed, hookimpl, option, technique
from hf_optim.checkpoints.remote_code import RemoteCode, convert, generate, joined
from hf_optim.toolkit.checkpoint import NamedTensors
from hf_optim.toolkit.modules import replace
from hf_optim.toolkit.pruning import masks, require_finite
from hf_optim.toolkit.quantization import codebooks
from hf_optim.toolkit.topology import parameter_names, weight_out_in

from . import _gobo_modules, _recompute_bits
from ._weights import QUANTIZES

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

# Most layers in a table on the card.
MOST_ROWS = 40
NO_GAUSSIAN = "nearly all of its weights are outliers under the threshold"


@technique(
    "gobo",
    family="quantization",
    paper=Paper(
        "2005.03842",
        "GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy Efficient Inference",
        2020,
    ),
    contract=QUANTIZES,
    reload=Reload.REMOTE_CODE,
)
class GOBO(Technique):
    """Quantize each layer to a codebook of 2^bits values, and store the outliers of its Gaussian unquantized.

    A layer with pruned weights has 0 among its centroids, so that these stay zero; they count neither for the Gaussian
    nor for the other centroids.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
        bits: of a code, 2 to 8; bits that an earlier step has assigned to a layer take precedence.
        threshold: natural logarithm of the density below which a weight is an outlier.
        iterations: most iterations over the centroids of a layer; it converges after a few.
        embedding_bits: of the codes of the input embedding's table; None leaves it unquantized. A table that the output
            head shares is left out.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int = option(3, low=2, high=8)
    threshold: float = -4.0
    iterations: int = option(100, low=0)
    embedding_bits: int | None = option(None, low=2, high=8)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="gobo",
        source=joined(replace, _gobo_modules),
        field=_gobo_modules.GoboModules.replaced_field,
        model_base=_gobo_modules.GoboModules.__name__,
    )

    def needs_data(self) -> bool:
        return False

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        """Round the weights of a scope in place; ``finalize_model`` replaces the layers by codebook layers.

        Until then the layers are ordinary ones, from which a killed run can be resumed.
        """
        yield from ()
        self._classes(run)
        layers, skipped = self._layers(run, scope)
        require_finite({f"{name}.weight": weight_out_in(layer) for name, layer in layers.items()}, run.label(self))
        for name, layer in list(layers.items()):
            bits = run.bits_of(name, self.bits)
            mask = masks.mask_out_in(layer, run.masks, f"{name}.weight")
            if not self._quantize(run, name, weight_out_in(layer), bits, mask):
                skipped.setdefault(NO_GAUSSIAN, []).append(name)
                del layers[name]
            else:
                layer.weight.requires_grad_(False)
        run.cover(self, layers, skipped)

    def _classes(self, run: Run) -> Any:
        """Return the generated module with the classes of the model's architecture."""
        config_class: Any = type(run.model.config)
        try:
            return generate(self.remote_code, config_class)
        except ModelError as error:
            raise ModelError(f"{run.label(self)}: {error}") from error

    def _layers(self, run: Run, scope: Scope) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
        """Return the linears to quantize, and the names of those that cannot be, by reason."""
        holders = parameter_names(scope.model)
        layers: dict[str, nn.Module] = {}
        skipped: dict[str, list[str]] = {}
        for name, layer in scope.select(self.targets, self.skip).items():
            bits = run.bits_of(name, self.bits)
            shared = [other for other in holders.get(id(layer.weight), ()) if other != f"{name}.weight"]
            if type(layer).forward not in (nn.Linear.forward, Conv1D.forward):
                skipped.setdefault(f"a {type(layer).__name__} is not a plain linear layer", []).append(name)
            elif shared:
                skipped.setdefault(f"its weight is tied to {shared[0]}", []).append(name)
            elif not 2 <= bits <= 8:
                skipped.setdefault(f"{bits} bits are assigned to it", []).append(name)
            else:
                layers[name] = layer
        stacks = [
            name for name, m in scope.module.named_modules(prefix=scope.name) if compressed.has_stacked_weights(m)
        ]
        stacks = [name for name in stacks if scope.holds(name)]
        if stacks and "Linear" in self.targets:
            skipped["stacked matrices: only linear layers get codebooks"] = stacks
        return layers, skipped

    @torch.no_grad()
    def _quantize(self, run: Run, name: str, weight: Tensor, bits: int, mask: Tensor | None) -> bool:
        """Round a matrix in place and keep its centroids in the step's state; return False if it has no Gaussian."""
        mask = None if mask is None or bool(mask.all()) else mask.to(weight.device)
        outlying = codebooks.outlier_mask(weight, self.threshold, mask)
        inner = ~outlying if mask is None else ~outlying & mask
        # The threshold is a density: for weights with a large standard deviation it lies above the peak.
        if int(inner.sum()) <= int(outlying.sum()):
            return False
        before = weight.clone()
        book = codebooks.fit_codebook(weight[inner], 2**bits, self.iterations, None if mask is None else 0.0)
        centroids = book.centroids.to(weight.dtype)
        weight.copy_(torch.where(outlying, weight, centroids[codebooks.nearest_centroids(weight, centroids).long()]))
        state, error = run.state(self), (weight - before).float()
        self._centroids(run)[name] = centroids
        state.figures = {
            **getattr(state, "figures", {}),
            name: {
                "bits": bits,
                "weights": weight.numel(),
                "outliers": int(outlying.sum()),
                "iterations": len(book.history) - 1,
                "l1_error": _rounded(error.abs().sum() / before.float().abs().sum()),
                "l2_error": _rounded(error.norm() / before.float().norm()),
            },
        }
        return True

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        state, classes = run.state(self), self._classes(run)
        self._quantize_embedding(run)
        entries, metrics, centroids = {}, state.figures, self._centroids(run)
        for name in metrics:
            coded = self._codebook_layer(classes, run.model.get_submodule(name), centroids[name])
            replace.replace_module(run.model, name, coded)
            entries[name] = {"bits": coded.bits, "outliers": len(coded.outliers)}
            entries[name]["most"] = int(coded.outlier_counts.max())
            size = sum(value.numel() * value.element_size() for value in coded.buffers())
            metrics[name] |= {
                "outlier_share": _rounded(metrics[name]["outliers"] / metrics[name]["weights"]),
                "bits_per_weight": _rounded(8 * size / metrics[name]["weights"]),
                "bytes_before": metrics[name]["weights"] * coded.centroids.element_size(),
                "bytes": size,
            }
        convert(run.model, self.remote_code, {"modules": entries})
        run.report(self, layers=metrics, **totals(metrics))

    def _centroids(self, run: Run) -> NamedTensors:
        """Return the centroids by layer name, which the state of the step keeps from ``calibrate`` on."""
        return NamedTensors(run.state(self), "centroids")

    def _quantize_embedding(self, run: Run) -> None:
        """Round the table of the input embedding if ``embedding_bits`` is set."""
        if self.embedding_bits is None:
            return
        table: Any = run.model.get_input_embeddings()
        name = next(name for name, module in run.model.named_modules() if module is table)
        if type(table) is not nn.Embedding:
            run.cover(self, [], {f"a {type(table).__name__} is not a plain embedding": [name]})
            return
        holders = parameter_names(run.model)[id(table.weight)]
        if len(holders) > 1:
            run.cover(self, [], {f"its table is tied to {holders[-1]}": [name]})
            return
        require_finite({f"{name}.weight": table.weight}, run.label(self))
        quantized = self._quantize(run, name, table.weight, self.embedding_bits, None)
        run.cover(self, [name] if quantized else [], {} if quantized else {NO_GAUSSIAN: [name]})

    def _codebook_layer(self, classes: Any, module: Any, centroids: Tensor) -> Any:
        """Return a codebook layer for a rounded one; a weight that equals no centroid is an outlier."""
        table = isinstance(module, nn.Embedding)
        weight: Any = module.weight.detach() if table else weight_out_in(module).detach()
        centroids = centroids.to(weight)
        codes = codebooks.nearest_centroids(weight, centroids)
        outlying = centroids[codes.long()] != weight
        count = outlying.sum(1)
        coded = classes.coded_like(module, len(centroids).bit_length() - 1, int(count.sum()), int(count.max()))
        coded.fill(weight, codes, centroids, outlying)
        return coded.train(module.training)

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute_bits.gobo(case)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        layers = metrics.get("layers")
        if not layers:
            return
        decoding = card.when(
            "The codes are decoded when a layer runs; reading them needs the code that comes with the checkpoint "
            "(`trust_remote_code=True`).",
            reload=[Reload.REMOTE_CODE],
        )
        card.paragraph(
            "GOBO",
            f"{len(layers)} layers were coded with a codebook each, {metrics['bits_per_weight']:.2f} bits per weight "
            f"with centroids, outliers and their positions: {metrics['bytes']:,} bytes instead of "
            f"{metrics['bytes_before']:,}, in memory and on disk. {100 * metrics['outlier_share']:.2f} % of the "
            f"weights are outliers, kept in the model's dtype.{decoding}",
        )
        widest = sorted(layers, key=lambda name: layers[name]["outlier_share"], reverse=True)[:MOST_ROWS]
        card.table(
            "GOBO: the layers" + f" with most outliers, {MOST_ROWS} of {len(layers)}" * (len(layers) > MOST_ROWS),
            ["layer", "bits", "outliers %", "bits per weight", "relative L1 error"],
            [
                [f"`{name}`", own["bits"], f"{100 * own['outlier_share']:.3f}", f"{own['bits_per_weight']:.3f}",
                 f"{own['l1_error']:.4f}"]
                for name, own in ((name, layers[name]) for name in widest)
            ],
        )  # fmt: skip


def totals(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return bytes before and after, bits per weight and the share of outliers over all layers."""
    size, before = (sum(own[key] for own in layers.values()) for key in ("bytes", "bytes_before"))
    weights, outliers = (sum(own[key] for own in layers.values()) for key in ("weights", "outliers"))
    return {
        "bytes_before": before,
        "bytes": size,
        "bits_per_weight": _rounded(8 * size / weights),
        "outlier_share": _rounded(outliers / weights),
    }


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")


@hookimpl
def register_techniques(register):
    register(GOBO)
