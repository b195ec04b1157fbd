"""Which quantization schemes vLLM, SGLang and TGI load, as data.

The rules were written from reading the sources of the versions named in ``SERVERS``; none of these servers was run. For
vLLM and SGLang that is ``layers/quantization/compressed_tensors`` with its schemes and the kernels they choose from,
for TGI ``layers/compressed_tensors`` and ``layers/marlin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The inputs of a weight `[out, in]` that have one scale: the group size, or PER_CHANNEL for all of a row.
PER_CHANNEL = -1
MARLIN_GROUPS = (PER_CHANNEL, 32, 64, 128)


@dataclass(frozen=True)
class Activations:
    """How a scheme quantizes the inputs of a layer."""

    bits: int
    type: str
    strategy: str
    symmetric: bool
    dynamic: bool


@dataclass(frozen=True)
class Scheme:
    """One group of a compressed-tensors configuration, in plain values.

    Attributes:
        format: how the weights are stored (``pack-quantized``, ``int-quantized`` ...).
        bits, type, strategy, symmetric, dynamic: of the weights; ``type`` is ``int`` or ``float``.
        group_size: inputs with one scale, ``PER_CHANNEL`` without groups.
        actorder: the order of activations, ``group`` or ``weight`` (also called ``dynamic`` and ``static``), or None.
        inputs: how inputs are quantized, or None.
    """

    format: str
    bits: int
    type: str
    strategy: str
    group_size: int
    symmetric: bool
    dynamic: bool
    actorder: str | None = None
    inputs: Activations | None = None

    @property
    def kind(self) -> str:
        """The kind of scheme, a key of ``Server.rules``; ``other`` if there is no rule for such schemes."""
        packed, bytes_ = self.format == "pack-quantized", self.format in ("int-quantized", "naive-quantized")
        if self.type == "int" and packed and self.strategy in ("channel", "group"):
            return "packed" if self.inputs is None else "packed, inputs quantized"
        if self.type == "int" and bytes_:
            if self.inputs is None:
                return "bytes"
            if self.inputs.type == "int" and self.inputs.bits == 8 and self.bits in (4, 8):
                return "W8A8" if self.bits == 8 else "W4A8"
        if self.type == "float" and self.bits == 8 and self.format in ("float-quantized", "naive-quantized"):
            return "FP8" if self.inputs is None or self.inputs.type == "float" else "other"
        if self.format == "nvfp4-pack-quantized" and self.strategy == "tensor_group" and self.group_size == 16:
            return "NVFP4"
        if self.format == "mxfp4-pack-quantized" and self.strategy == "group" and self.group_size == 32:
            return "MXFP4" if self.inputs is None else "other"
        return "other"

    @property
    def label(self) -> str:
        """The scheme in a few words: ``"4-bit int weights in groups of 32, with zero points (pack-quantized)"``."""
        where = f"in groups of {self.group_size}" if self.group_size != PER_CHANNEL else f"per {self.strategy}"
        points = "" if self.symmetric else ", with zero points"
        if self.inputs is None:
            inputs = ""
        else:
            how = "dynamic" if self.inputs.dynamic else "static"
            inputs = f", {self.inputs.bits}-bit {self.inputs.type} inputs ({how}, per {self.inputs.strategy})"
        return f"{self.bits}-bit {self.type} weights {where}{points}{inputs} ({self.format})"


@dataclass(frozen=True)
class Rule:
    """What a server accepts of one kind of scheme.

    Attributes:
        refused: why it accepts none at all; empty otherwise.
        bits: bits of the weights.
        zero_point_bits: bits at which weights may have zero points.
        strategies: of the weights.
        group_sizes: group sizes; empty if any is accepted.
        shapes: pairs ``(in, out)``: the inputs and outputs of a layer are multiples of those of one pair; empty if any
            shape is accepted.
        static_inputs: False if one calibrated scale for the inputs is not accepted.
        usual_bits, usual_groups: those beyond them run, but see ``unusual``.
        unusual: said of a scheme beyond ``usual_bits`` and ``usual_groups``.
        note: said of every scheme of this kind.
    """

    refused: str = ""
    bits: tuple[int, ...] = (8,)
    zero_point_bits: tuple[int, ...] = ()
    strategies: tuple[str, ...] = ("tensor", "channel", "group", "block", "tensor_group")
    group_sizes: tuple[int, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    static_inputs: bool = True
    usual_bits: tuple[int, ...] = ()
    usual_groups: tuple[int, ...] = ()
    unusual: str = ""
    note: str = ""


@dataclass(frozen=True)
class Server:
    """A server, and what of a compressed-tensors checkpoint it reads.

    Attributes:
        name, version: the version whose source was read.
        command: starts it; ``{path}`` is the checkpoint.
        rules: by kind of scheme; a kind without a rule is not read.
        expert_rules: instead of ``rules``, for the experts of a mixture.
        experts_refused: why it reads no mixture of experts with a quantized layer; empty if it does.
        orders: values of ``actorder`` that it reads.
        order_needs_groups: its compressed-tensors refuses an ``actorder`` on weights without groups.
        head_by_name: an output head is quantized only if a target names it; the class ``Linear`` does not reach it.
        all_matched: every linear layer must be matched by a target or by ``ignore``.
        one_format: the format of the whole configuration counts, not that of the group.
        class_before_parts: for projections that it fuses, the target ``Linear`` comes before targets by name.
        sparsity_refused: why a ``sparsity_config`` with targets is not read; empty if it is ignored.
        gptq, awq: ``{bits: group sizes}`` of checkpoints in the layouts of GPTQ and AWQ.
        gptq_zero_points: it reads the zero points of GPTQ checkpoints.
        flat_rope: it reads ``rope_theta`` and ``rope_scaling``, not ``rope_parameters``.
    """

    name: str
    version: str
    command: str
    rules: Mapping[str, Rule]
    expert_rules: Mapping[str, Rule] = field(default_factory=dict)
    experts_refused: str = ""
    orders: tuple[str, ...] = ("weight", "static")
    order_needs_groups: bool = False
    head_by_name: bool = True
    all_matched: bool = False
    one_format: bool = False
    class_before_parts: bool = False
    sparsity_refused: str = ""
    gptq: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    awq: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    gptq_zero_points: bool = False
    flat_rope: bool = False


_UNPACKED = (
    "integer codes of a byte each are read only with quantized inputs; hf_optim stores weights with zero points so: "
    "compress with symmetric: true"
)
VLLM = Server(
    "vLLM",
    "0.33.0",
    "vllm serve {path}",
    rules={
        "packed": Rule(
            bits=(2, 3, 4, 5, 6, 7, 8),
            zero_point_bits=(2, 3, 4, 5, 6, 7, 8),
            usual_bits=(4, 8),
            usual_groups=MARLIN_GROUPS,
            unusual="outside 4 and 8 bits per channel or in groups of 32, 64 and 128, only its Triton, Exllama or "
            "Humming kernels remain, and the last have no check of shapes in vLLM",
        ),
        "packed, inputs quantized": Rule(
            bits=(2, 3, 4, 5, 6, 7, 8), static_inputs=False, note="runs on its Humming kernels (NVIDIA)"
        ),
        "W8A8": Rule(strategies=("tensor", "channel")),
        "W4A8": Rule(
            bits=(4,), static_inputs=False, strategies=("channel", "group"), note="its kernel for W4A8 is for CPUs only"
        ),
        "FP8": Rule(
            strategies=("tensor", "channel", "block"), note="below compute capability 8.9 it does not quantize inputs"
        ),
        "NVFP4": Rule(bits=(4,)),
        "MXFP4": Rule(bits=(4,)),
        "bytes": Rule(refused=_UNPACKED),
    },
    expert_rules={
        "packed": Rule(
            bits=(2, 3, 4, 5, 6, 7, 8), zero_point_bits=(4,), usual_bits=(4, 8), usual_groups=MARLIN_GROUPS,
            unusual="experts outside 4 and 8 bits per channel or in groups of 32, 64 and 128 have no Marlin kernel",
        ),
        "W8A8": Rule(strategies=("tensor", "channel"), static_inputs=False),
        "FP8": Rule(strategies=("tensor", "channel", "block")),
        "NVFP4": Rule(bits=(4,)),
    },
    sparsity_refused="it has removed the reading of sparsity_config",
    gptq={4: MARLIN_GROUPS, 8: MARLIN_GROUPS},
    awq={4: MARLIN_GROUPS},
)  # fmt: skip
SGLANG = Server(
    "SGLang",
    "0.5.23",
    "python -m sglang.launch_server --model-path {path}",
    rules={
        "packed": Rule(bits=(4, 8), zero_point_bits=(4, 8), group_sizes=MARLIN_GROUPS, shapes=((128, 64),)),
        "W8A8": Rule(strategies=("tensor", "channel")),
        "FP8": Rule(
            strategies=("tensor", "channel", "block"), note="below compute capability 8.9 it does not quantize inputs"
        ),
        "NVFP4": Rule(bits=(4,)),
        "bytes": Rule(refused=_UNPACKED),
    },
    expert_rules={
        "packed": Rule(bits=(4, 8), group_sizes=MARLIN_GROUPS),
        "FP8": Rule(strategies=("tensor", "channel", "block")),
        "W8A8": Rule(refused="experts in int8 with quantized inputs are implemented for NPUs only"),
        "NVFP4": Rule(bits=(4,)),
    },
    orders=("weight", "static", "group", "dynamic"),
    all_matched=True,
    class_before_parts=True,
    sparsity_refused="it has removed its 2:4 kernels",
    gptq={4: MARLIN_GROUPS, 8: MARLIN_GROUPS},
    awq={4: MARLIN_GROUPS},
)
# Its Marlin kernels have two layouts of threads.
TGI_SHAPES = ((128, 64), (64, 128))
TGI = Server(
    "TGI",
    "db931fc",
    "text-generation-launcher --model-id {path}",
    rules={
        "packed": Rule(bits=(4, 8), group_sizes=MARLIN_GROUPS, shapes=TGI_SHAPES),
        "packed, inputs quantized": Rule(
            bits=(4, 8), group_sizes=MARLIN_GROUPS, shapes=TGI_SHAPES, note="it leaves inputs unquantized"
        ),
        "W8A8": Rule(strategies=("tensor", "channel"), note="it always takes the scales of inputs per token"),
        "FP8": Rule(strategies=("tensor", "channel")),
        "bytes": Rule(refused=_UNPACKED),
    },
    experts_refused="it loads no experts beside a compressed-tensors configuration",
    order_needs_groups=True,
    head_by_name=False,
    all_matched=True,
    one_format=True,
    gptq={2: MARLIN_GROUPS, 3: MARLIN_GROUPS, 4: MARLIN_GROUPS, 8: MARLIN_GROUPS},
    awq={4: MARLIN_GROUPS},
    gptq_zero_points=True,
    flat_rope=True,
)
SERVERS = (VLLM, SGLANG, TGI)

# Projections of one parent that the servers fuse into one matrix, which has one scheme.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
