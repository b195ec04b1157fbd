"""Terraformer: sparse feed-forward layers, sparse projections, LSH attention, reversible layers and a recurrence.

    y1 = x1 + Attention(x2),    y2 = x2 + FFN(y1) + U SRU(D y1),    output: the mean of both streams

Jaszczur et al., "Sparse is Enough in Scaling Transformers", arXiv 2111.12763, section 5. Each part can be switched off:

- ``sparse_ffn``: of each ``block`` of N units a token computes one, which a low-rank controller picks.
- ``sparse_qkv``: queries, keys and values come from a multiplicative layer and convolutions; no output projection.
- ``lsh``: a token sees tokens that random rotations hash alike; keys are the queries at unit length (Kitaev et al.,
  arXiv 2001.04451). Chunks are cut in each bucket by itself, so nothing depends on later tokens; the authors cut them
  over all tokens.
- ``reversible``: activations are computed again in the backward, so memory does not grow with depth.
- ``recurrence``: simple recurrent units (Lei et al., arXiv 1709.02755) beside the feed-forward layer.

The model has the vocabulary, width, heads, context, positions, norms and head of the decoder that is given, and weights
drawn from ``seed``: those of the decoder are not used, and it has to be trained from scratch. It differs from the
authors' code: a decoder alone, not an encoder and a decoder that read one sequence; one attention in a block, not two;
the recurrence reads the norm of the feed-forward layer, not one of its own; rotary positions where the decoder has
them; the loss layer is that of the decoder; and no ``forgetting`` layers between reversible ones.

Decoding: a cache holds, of each layer, keys (with LSH: hashed queries) and values, the last two outputs of the
multiplicative layer, and the state of the recurrence. It cannot be cropped. The checkpoint brings its own code.
REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_optim import (
    Card,
    Contract,
    ModelError,
    Paper,
    Reload,
    Run,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode, convert, joined, require_own_code
from hf_optim.toolkit.attention import (
    LEARNED,
    LSH_PAGES,
    STORED,
    require_on_interface,
    require_self_attention,
)
from hf_optim.toolkit.modules import feed_forward_inlets, thread_values
from hf_optim.toolkit.modules import replace as replaced_modules

from . import (
    _held_parts,
    _sparse_ffn_codes,
    _sparse_ffn_kernel,
    _sparse_ffn_modules,
    _sparse_qkv_model,
    _sparse_qkv_modules,
    _terraformer_model,
    _terraformer_modules,
)
from ._sparse_qkv_layout import require_decoder, settings_for
from ._terraformer_scratch import blocks_of, buckets_for, feed_forward_of, from_scratch


@technique(
    "terraformer",
    family="sparsity",
    paper=Paper("2111.12763", "Sparse is Enough in Scaling Transformers", 2021),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.QUANTIZED, traits.SPARSE_ATTENTION, traits.TIED_BLOCKS, traits.MOE},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Terraformer(Technique):
    """Build a Terraformer of the vocabulary, width and context of a decoder, to be trained from scratch.

    Attributes:
        layers: of the new model; None: as many as the decoder has.
        sparse_ffn: feed-forward layers compute one unit of each block.
        block: N, units of a block.
        rank: of the controller; None: 64, or the width if that is less.
        temperature: of the Gumbel noise in training.
        hard_share: share of training calls with one unit of each block; the others take the softmax over the block.
        activation: of the units.
        gated: units have a gate, as in Llama; the paper has none.
        sparse_qkv: queries, keys and values come from a multiplicative layer and convolutions.
        modules: S of these; None: as many as the decoder has query heads.
        concat: what values read beside the shared output, as in the technique for projections alone.
        lsh: attention to tokens that hash alike.
        chunk: tokens of a chunk of LSH attention.
        rounds: of hashing.
        buckets: factors of the number of buckets of a round; empty: 2 n / chunk for the n tokens of the context.
        reversible: two streams, whose activations are computed again in the backward.
        recurrence: width of the simple recurrent units beside the feed-forward layer; 0 for none.
        recurrent_layers: units one behind the other.
        small_start: values and recurrences begin as small as other layers of the decoder do; False: as large as the
            authors', whose embeddings are of size 1.
        seed: of all weights and rotations.
    """

    layers: int | None = option(None, low=1, high=4096)
    sparse_ffn: bool = True
    block: int = option(64, low=1, high=65536)
    rank: int | None = option(None, low=1, high=65536)
    temperature: float = option(0.1, low=0.0, high=100.0)
    hard_share: float = option(0.3, low=0.0, high=1.0)
    activation: Literal["relu", "gelu", "silu"] = "relu"
    gated: bool = False
    sparse_qkv: bool = True
    modules: int | None = option(None, low=1, high=65536)
    concat: Literal["none", "fixed", "original"] = "none"
    lsh: bool = True
    chunk: int = option(128, low=2, high=2**20)
    rounds: int = option(2, low=1, high=64)
    buckets: tuple[int, ...] = ()
    reversible: bool = True
    recurrence: int = option(32, low=0, high=65536)
    recurrent_layers: int = option(1, low=1, high=64)
    small_start: bool = True
    seed: int = option(0, low=0, high=2**31 - 1)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="terraformer",
        source=joined(
            *STORED,
            *LEARNED,
            *LSH_PAGES,
            replaced_modules,
            thread_values,
            feed_forward_inlets,
            _held_parts,
            _sparse_ffn_codes,
            _sparse_ffn_kernel,
            _sparse_ffn_modules,
            _sparse_qkv_modules,
            _sparse_qkv_model,
            _terraformer_modules,
            _terraformer_model,
        ),
        config_base=_terraformer_model.TerraformerConfig.__name__,
        field="attention_pattern",
        model_base=_terraformer_model.TerraformerModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"block": 4, "chunk": 4, "buckets": [4], "recurrence": 4})

    def needs_data(self) -> bool:
        return False

    def needs_whole_model(self) -> bool:
        return True

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._settings(model, label)

    def _settings(self, model: PreTrainedModel, label: str) -> dict[str, Any]:
        """Return the settings for a model. Raises ``ModelError`` for one of which none can be built."""
        require_on_interface(model, label)
        require_decoder(model, label)
        require_own_code(model, self.remote_code, label)
        names = blocks_of(model, label)
        about = {"kernel": 3, "concat": self.concat, "output": "none", "share_qk": self.lsh}
        projections, lsh = {}, {}
        if self.lsh:
            _require_plain_attention(model, label)
        if self.lsh or self.sparse_qkv:
            text = model.config.get_text_config()
            width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            if self.sparse_qkv:
                projections = settings_for(model, self.modules, about, label, reads_keys=not self.lsh)
            if self.lsh:
                lsh = {
                    "factors": buckets_for(model, self.buckets, self.chunk, label),
                    "rounds": self.rounds,
                    "chunk": self.chunk,
                    "heads": text.num_attention_heads,
                    "head_width": width,
                    "seed": self.seed,
                }
        settings = {
            "blocks": names,
            "reversible": self.reversible,
            "projections": projections,
            "feed_forward": feed_forward_of(model, self, label) if self.sparse_ffn else {},
            "lsh": lsh,
            "recurrence": {"units": self.recurrence, "layers": self.recurrent_layers} if self.recurrence else {},
        }
        try:
            _terraformer_model.read_terraformer(settings)
            if lsh:
                _terraformer_model.TERRAFORMER_LSH.read(settings)
        except ValueError as error:
            raise ModelError(f"{label}: {error}") from None
        return settings

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        require_self_attention(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        label = run.label(self)
        settings = self._settings(run.model, label)
        made = from_scratch(run.model, self.layers, self.seed, settings, self.small_start)
        convert(made, self.remote_code, settings)
        if settings["lsh"]:
            made.set_attn_implementation(_terraformer_model.TERRAFORMER_LSH.name)
        run.record.reload = Reload.REMOTE_CODE.name
        parts = ("feed_forward", "projections", "lsh", "recurrence")
        run.report(
            self,
            layers=made.config.num_hidden_layers,
            parts=[name for name in parts if settings[name]] + ["reversible"] * self.reversible,
            parameters_before=run.model.num_parameters(),
            parameters_after=made.num_parameters(),
            model_class=type(made).__name__,
        )
        return made

    def recompute(self, case: Any) -> dict[str, Any]:
        settings = case.config["attention_pattern"]
        parts = ("feed_forward", "projections", "lsh", "recurrence")
        return {
            "layers": len(case.config["layer_types"]),
            "parts": [name for name in parts if settings[name]] + ["reversible"] * settings["reversible"],
            "parameters_before": sum(parameter.numel() for parameter in case.before.parameters()),
            "parameters_after": sum(parameter.numel() for parameter in case.after.parameters()),
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        named = {
            "feed_forward": "sparse feed-forward layers",
            "projections": "sparse projections",
            "lsh": "LSH attention",
            "recurrence": "simple recurrent units",
            "reversible": "reversible layers",
        }
        parts = ", ".join(named[part] for part in figures["parts"]) or "none of its parts"
        card.paragraph(
            "Terraformer",
            f"The model was built from scratch, with random weights: {figures['layers']} layers with {parts}. It has "
            f"{figures['parameters_after']:,} parameters; the decoder of which it has the vocabulary and the width has "
            f"{figures['parameters_before']:,}.",
        )


def _require_plain_attention(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` for a model whose attention has what LSH attention has not: windows, caps of its scores."""
    text = model.config.get_text_config()
    windows = any(type(layer) is not DynamicLayer for layer in DynamicCache(config=text).layers)
    if windows or getattr(text, "attn_logit_softcapping", None) is not None:
        what = "sees a sliding window in some layers" if windows else "caps the scores of its attention"
        raise ModelError(f"{label}: {type(model).__name__} {what}, and LSH attention does not: set lsh: false")


@hookimpl
def register_techniques(register) -> None:
    register(Terraformer)
