"""Keys and values in 4 or 8 bits: the memory that grows with every token, and what decoding a long context reads.

    symmetric:   scale = max |x| / (2^(b-1) - 1),      q(x) = scale * round(x / scale)
    asymmetric:  scale = (max x - min x) / (2^b - 1),  q(x) = scale * round((x - min x) / scale) + min x
    float8:      scale = max |x| / 448,                q(x) = scale * e4m3(x / scale)

The keys of most models have channels that are large for every token, so a scale belongs to a channel of ``group``
consecutive tokens; values have none, and a scale for each token and head. A group is quantized once, when it is full
and older than the ``residual`` latest tokens, which are in full precision.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750. The paper divides a
token's values into groups of channels as well, and quantizes keys and values of one token at different times; here the
values of a head are one group, and both are quantized together. Bits of 4 and 8 and float8 are ours.

The weights are unchanged. The setting is an entry of ``config.json``, which stock transformers ignores: there the model
has its ordinary cache. ``hf_optim.generate`` uses the quantized one, whether or not the model was loaded with
``optim_config="auto"``, and ``hf_optim.key_value_cache(model)`` makes one for transformers' ``generate``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Card, Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit.quantization import KeyValueScheme, cache_layers, cache_size, scheme_of, set_scheme


@technique(
    "kv_cache",
    family="runtime",
    paper=Paper("2402.02750", "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024),
    contract=Contract(keeps={traits.SPARSE, traits.SPARSE_NM}, owns={"key_value_cache"}),
    reload=Reload.STOCK_DENSE,
)
class KVCache(Technique):
    """Quantize keys and values in generation; the weights are unchanged.

    Attributes:
        bits: 4, 8, or ``float8`` (e4m3).
        keys: ``channel`` for a scale of each channel of ``group`` tokens, ``token`` for one of each token and head.
        group: 32, 64 or 128 tokens.
        residual: the latest tokens that stay in full precision.
        symmetric: no zero points; null is false with 4 bits and true otherwise.
    """

    bits: int | str = option(8, choices=(4, 8, "float8"))
    keys: str = option("channel", choices=("channel", "token"))
    group: int = option(64, choices=(32, 64, 128))
    residual: int = option(128, low=0, high=4096)
    symmetric: bool | None = None

    @classmethod
    def for_testing(cls) -> KVCache:
        return cls(bits=4, keys="channel", group=32, residual=0)

    @property
    def scheme(self) -> KeyValueScheme:
        """The setting that ``hf_optim.generate`` reads."""
        return KeyValueScheme(self.bits, self.keys, self.group, self.residual, self.symmetric)

    def validate(self) -> None:
        _ = self.scheme

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_decoder(model, label)
        try:
            layers = cache_layers(model.config)
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error
        if not any(layer.takes(self.scheme) for layer in layers):
            raise ModelError(
                f"{label}: every layer of {model.config.model_type} has a sliding window, an attention pattern, or "
                "heads of more than 256 channels, and keeps full precision: there is nothing to quantize"
            )

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        self.check_model(run.model, run.label(self))
        config = run.model.config
        set_scheme(config, self.scheme)
        run.report(self, **figures(config, self.scheme))

    def recompute(self, case: Any) -> dict[str, Any]:
        scheme = scheme_of(case.after.config)
        assert scheme == self.scheme
        return figures(case.after.config, scheme)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if not metrics:
            return
        bits = "float8 (e4m3)" if self.bits == "float8" else f"{self.bits} bits"
        scales = f"each channel of {self.group} tokens" if self.keys == "channel" else "each token and head"
        card.paragraph(
            "Key/value cache",
            f"In `hf_optim.generate`, the keys and values of {metrics['layers_quantized']} of {metrics['layers']} "
            f"layers are kept in {bits}, with a scale for {scales} of the keys, and for each token and head of the "
            f"values; {self._in_full_precision()} are in full precision. At {metrics['context']:,} tokens of "
            f"context, a sequence takes {metrics['bytes_after']:,} bytes instead of {metrics['bytes_before']:,} in 16 "
            "bits. The step changes no weight, and transformers' own `generate` has its ordinary cache. Quality, "
            "memory and times in the results, where there are any, are those of that cache, not of this step.",
        )

    def _in_full_precision(self) -> str:
        waiting = f"up to {self.scheme.step} tokens that wait for their group to be full"
        if self.residual == 0:
            return f"only {waiting}"
        latest = "latest token" if self.residual == 1 else f"latest {self.residual} tokens"
        return f"the {latest}, and {waiting},"


def figures(config: PretrainedConfig, scheme: KeyValueScheme) -> dict[str, Any]:
    """Return what is reported: layers, and the bytes of the cache of one sequence at full context."""
    layers = cache_layers(config)
    context = int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", 0) or 4096)
    return {
        "layers": len(layers),
        "layers_quantized": sum(layer.takes(scheme) for layer in layers),
        "context": context,
        "bytes_before": cache_size(layers, 1, context).total,
        "bytes_after": cache_size(layers, 1, context, scheme).total,
    }


def require_decoder(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` for a model that does not generate text token by token."""
    if not model.can_generate():
        raise ModelError(f"{label}: {type(model).__name__} does not generate, so that it keeps no keys and values")


@hookimpl
def register_techniques(register) -> None:
    register(KVCache)
