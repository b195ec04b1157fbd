"""Memory-compressed attention: a strided convolution makes one key and one value of several tokens before the softmax.

    K' = conv_K(K),   V' = conv_V(V)    (kernel = stride = c),      A = softmax(Q [K' | K_raw]^T / sqrt(d)) [V' | V_raw]

Liu, Saleh, Pot, Goodrich, Sepassi, Kaiser, Shazeer, "Generating Wikipedia by Summarizing Long Sequences", arXiv
1801.10198, section 4.2.3; c is 3 there. The paper gives two parts of a decoder: attention like this in every second
layer, and attention within blocks of 256 tokens in the others. Here every layer compresses, and ``local`` gives each
query the tokens near it as they are.

- Which windows: a row is cut into windows of c tokens from its first token, padding left out. In a causal model a query
  sees a window if all of its tokens are the query itself or lie before it, at least ``local`` positions; of the tokens
  after these windows it sees each, up to itself. So no key holds a token of the future. In an encoder a query sees all
  complete windows that are at least ``local`` positions away, and all other tokens as they are. A token is seen once.
- The convolution: of each head by itself, for keys and for values, without bias, ``2 G D^2 c`` weights in a layer. It
  begins as the mean. Keys of models with rotary embeddings are compressed after the rotation.
- The cache of a decoder holds the windows and the tokens that are not compressed yet, n / c + local + c - 1 of them at
  most. Caches of other kinds (static, quantized, offloaded ones) work too, and save nothing.
- With c = 1, or ``local`` not below the length, this is the model's full attention.

A converted model has lost detail and needs training: the convolutions are weights of the model, trained and saved with
it. The checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Card, Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, convert, joined, require_own_code
from hf_optim.toolkit.attention import FIELD, STORED, hidden_states, number_layers
from hf_optim.toolkit.topology import dummy_inputs

from . import _compressed_attention, _compressed_cache, _compressed_model, _compressed_terms, _key_compression
from ._attach import context_length, prove, require_interface, require_self_attention
from ._key_sizes import key_sizes


@technique(
    "compressed",
    family="attention",
    paper=Paper("1801.10198", "Generating Wikipedia by Summarizing Long Sequences", 2018),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Compressed(Technique):
    """Compress the keys and values of every few tokens to one.

    Attributes:
        stride: tokens in a window, and width of the convolution.
        local: positions from a query within which it sees tokens as they are; 256 is the block of the paper's local
            attention. What lies near matters most: 0 loses much.
    """

    stride: int = option(3, low=1, high=4096)
    local: int = option(256, low=0)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="compressed",
        source=joined(
            *STORED, _key_compression, _compressed_terms, _compressed_attention, _compressed_cache, _compressed_model
        ),
        config_base=_compressed_model.CompressedBase.__name__,
        field=FIELD,
        model_base=_compressed_model.CompressedModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"stride": 3, "local": 2})

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_interface(model, self.remote_code, label)
        self._require_windows(model.config, label)

    def _require_windows(self, config: PretrainedConfig, label: str) -> None:
        """Raise ``ModelError`` if no row that the model reads is as long as a window."""
        context = context_length(config)
        if context is not None and self.stride > context:
            raise ModelError(
                f"{label}: stride is {self.stride:,}, and the model reads at most {context:,} tokens, which make no "
                "window: choose a smaller stride"
            )

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        require_self_attention(run.config, run.label(self), run.loaded_class)
        self._require_windows(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        require_own_code(model, self.remote_code, label)
        self._require_windows(model.config, label)
        inputs = dummy_inputs(model)
        full = hidden_states(model, inputs)
        causal = prove(model, inputs, full, label).causal
        heads, width = key_sizes(model, inputs, _compressed_model.attentions(model), label)
        number_layers(model)
        settings = {"stride": self.stride, "local": self.local, "key_heads": heads, "head_width": width}
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        _compressed_model.add_compression(model, settings, device=weight.device, dtype=weight.dtype)
        convert(model, self.remote_code, settings)
        model.attach_attention()  # type: ignore[operator]
        run.record.reload = Reload.REMOTE_CODE.name
        layers = model.config.get_text_config().num_hidden_layers
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or full.shape[1]
        run.report(
            self,
            **settings,
            layers=layers,
            context=context,
            share_of_attention=share(context, self.stride, self.local, causal),
            share_of_cache=held(context, self.stride, self.local) / context if causal else 1.0,
            weights_added=layers * 2 * heads * width * width * self.stride,
            model_class=type(model).__name__,
        )
        return model

    def recompute(self, case: Any) -> dict[str, Any]:
        settings, length = case.config["attention_pattern"], case.config["max_position_embeddings"]
        stride, local = settings["stride"], settings["local"]
        causal = "CausalLM" in case.config["architectures"][0]
        seen = []
        for i in range(length):
            tokens = range(i + 1) if causal else range(length)
            windows = [tokens[k : k + stride] for k in range(0, len(tokens), stride)]
            whole = [len(w) == stride and (not local or min(abs(i - j) for j in w) >= local) for w in windows]
            seen.append(sum(1 if one else len(w) for one, w in zip(whole, windows, strict=True)))
        pairs = length * (length + 1) // 2 if causal else length**2
        return {
            **settings,
            "layers": len(case.config["layer_types"]),
            "context": length,
            "share_of_attention": sum(seen) / pairs,
            "share_of_cache": seen[-1] / length if causal else 1.0,
            "weights_added": sum(t.numel() for name, t in case.tensors.items() if ".compression." in name),
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        card.paragraph(
            "Compressed attention",
            f"Convolutions make one key and one value of every {figures['stride']} tokens "
            f"({figures['weights_added']:,} weights). At {figures['context']} tokens a query sees "
            f"{figures['share_of_attention']:.1%} of the keys of full attention, and a cache holds "
            f"{figures['share_of_cache']:.1%} of them.",
        )


def held(tokens: int, stride: int, local: int) -> int:
    """Return how many keys a decoder holds after ``tokens`` tokens: compressed and raw ones."""
    windows = max(0, tokens - local) // stride
    return windows + tokens - windows * stride


def share(length: int, stride: int, local: int, causal: bool) -> float:
    """Return the keys that queries see, as a share of those of full attention over ``length`` tokens."""
    if causal:
        return sum(held(n, stride, local) for n in range(1, length + 1)) / (length * (length + 1) / 2)
    windows = length // stride
    seen = length * (windows + length - windows * stride)
    if local:
        for i in range(length):
            first = max(0, i - local + 1) // stride
            last = min(windows - 1, (i + local - 1) // stride)
            seen += max(0, last - first + 1) * (stride - 1)
    return seen / length**2


@hookimpl
def register_techniques(register) -> None:
    register(Compressed)
