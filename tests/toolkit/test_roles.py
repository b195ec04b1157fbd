"""What routes is found by what it does: in every mixture listed here, and in no dense model.

``ROUTING`` is written by hand, from the sources of transformers: it is not what the code under test returns.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_llama, tiny_mixtral
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import hf_optim
from hf_optim.toolkit import topology

SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_topk": 2, "moe_k": 2, "kv_channels": 8},
    **{
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "v_head_dim": 8,
    },
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "n_shared_experts": 1, "is_moe": True},
    **{"moe_layer_start_index": 0, "v_head_dim": 8},
    **{
        "num_dense_layers": 0,
        "max_position_embeddings": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    **{"mamba_n_groups": 1, "mamba_expand": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "n_embd": 32},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "ssm_state_size": 8, "expert_ffn_hidden_size": 16},
    **{"ffn_hidden_size": 32, "zero_expert_num": 2, "moe_top_k": 2, "shared_intermediate_size": 16, "n_head": 4},
    **{
        "intermediate_size_mlp": 64,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_layer": 2,
        "d_model": 32,
        "n_heads": 4,
    },
    **{"n_layers": 2, "mamba_d_conv": 4},
}

MLP_GATE = ("model.layers.*.mlp.gate",)
ROUTING: dict[str, tuple[str, ...]] = {
    "afmoe": ("model.layers.*.mlp.router.gate",),
    "deepseek_v2": MLP_GATE,
    "deepseek_v3": MLP_GATE,
    "doge": ("model.layers.*.mlp.router_gate",),
    "dots1": MLP_GATE,
    "ernie4_5_moe": MLP_GATE,
    "exaone_moe": MLP_GATE,
    "flex_olmo": MLP_GATE,
    "glm4_moe": MLP_GATE,
    "gpt_oss": ("model.layers.*.mlp.router",),
    "granitemoe": ("model.layers.*.block_sparse_moe.router",),
    "granitemoeshared": ("model.layers.*.block_sparse_moe.router",),
    "granitemoehybrid": ("model.layers.*.block_sparse_moe.router",),
    "hunyuan_v1_moe": ("model.layers.*.mlp.gate.wg",),
    "jamba": ("model.layers.*.feed_forward.router",),
    "jetmoe": ("model.layers.*.mlp.router.layer", "model.layers.*.self_attention.experts.router.layer"),
    "llama4_text": ("model.layers.*.feed_forward.router",),
    "longcat_flash": ("model.layers.*.mlp.router.classifier",),
    "minimax": MLP_GATE,
    "mixtral": MLP_GATE,
    "nemotron_h": ("model.layers.*.mixer.gate",),
    "olmoe": MLP_GATE,
    "phimoe": ("model.layers.*.mlp.router",),
    "qwen2_moe": (*MLP_GATE, "model.layers.*.mlp.shared_expert_gate"),
    "qwen3_moe": MLP_GATE,
    "qwen3_next": (*MLP_GATE, "model.layers.*.mlp.shared_expert_gate"),
    "solar_open": MLP_GATE,
}

# fmt: off
DENSE = [
    "apertus", "arcee", "bamba", "bart", "bert", "biogpt", "bitnet", "blenderbot", "bloom", "camembert", "codegen",
    "cohere", "cohere2", "ctrl", "cwm", "electra", "exaone4", "falcon", "falcon_h1", "falcon_mamba", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "helium",
    "hunyuan_v1_dense", "lfm2", "llama", "mamba", "mamba2", "ministral", "mistral", "modernbert-decoder", "mpt",
    "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "recurrent_gemma", "roberta", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "trocr", "vaultgemma",
    "xglm", "xlnet", "zamba2",
]
# fmt: on


def skeleton(kind: str, device: str = "meta") -> Any:
    """Build the causal language model of a type of configuration, of small sizes; the meta device needs no memory."""
    base = CONFIG_MAPPING[kind]
    known = {*inspect.signature(base.__init__).parameters, *vars(base)}
    for cls in base.__mro__:
        known |= set(getattr(cls, "__annotations__", {}))
    sizes = {name: value for name, value in SIZES.items() if name in known and (name != "is_moe" or kind == "doge")}
    config = base(**sizes)
    if hasattr(config, "pad_token_id") and config.pad_token_id is None:
        config.pad_token_id = 0
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def general(names: Any) -> set[str]:
    return {re.sub(r"\.\d+", ".*", name) for name in names}


@pytest.mark.parametrize("kind", ROUTING)
def test_what_routes_in_a_mixture(kind):
    model = skeleton(kind)
    found = topology.routes(model)
    assert general(found) == set(ROUTING[kind])
    blocks = {name for name, _ in model.named_modules() if general([name]) <= set(ROUTING[kind])}
    assert found == blocks  # in every block, those that the trace did not reach included


def test_nothing_routes_in_a_dense_model():
    checked, wrong = 0, {}
    for kind in DENSE:
        try:
            model = skeleton(kind)
            topology.trace(model)
        except Exception:  # these sizes do not suit it, or it has no trace without weights: whatever it raises
            continue
        checked += 1
        if found := topology.routes(model):
            wrong[kind] = found
    assert not wrong
    assert checked >= 40, checked


def test_roles_of_the_tiny_models():
    for family, build in TINY.items():
        routing = general(topology.routes(build()))
        assert routing == (set(MLP_GATE) if family == "mixtral" else set())


STEPS: dict[str, dict[str, Any]] = {
    "rtn": {"technique": "rtn", "bits": 4, "group_size": 16},
    "fp8": {"technique": "rtn", "bits": 8, "format": "fp8"},
    "gptq": {"technique": "gptq", "bits": 4, "group_size": 16},
    "nm": {"technique": "nm"},
    "magnitude": {"technique": "magnitude"},
}


REFUSED = {(kind, step) for kind in ("jetmoe", "llama4_text") for step in ("rtn", "gptq")}


@pytest.fixture(scope="module")
def originals():
    return {kind: skeleton(kind, "cpu") for kind in ("phimoe", "jetmoe", "llama4_text", "qwen2_moe", "doge")}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["phimoe", "jetmoe", "llama4_text", "qwen2_moe", "doge"])
def test_no_technique_changes_what_routes(originals, kind, step):
    model = copy.deepcopy(originals[kind])
    routing = [name for name, _ in model.named_parameters() if general([name.rpartition(".")[0]]) <= set(ROUTING[kind])]
    before = {name: model.get_parameter(name).clone() for name in routing}
    assert before
    calibration = [{"input_ids": torch.randint(3, 128, (2, 16))}]
    if (kind, step) in REFUSED:
        with pytest.raises(hf_optim.OptimError, match="experts"):  # integer codes of them could not be read back
            hf_optim.optimize(model, [STEPS[step]], calibration=calibration)
        return
    model = hf_optim.optimize(model, [STEPS[step]], calibration=calibration)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
    (coverage,) = hf_optim.run_of(model).record.coverage.values()
    assert general(coverage["skipped"]["router"]) <= set(ROUTING[kind])


@pytest.mark.parametrize("pattern", ["*", "*gate*", r"re:.*gate", "Linear"])
def test_a_pattern_does_not_select_what_routes_and_its_exact_name_does(originals, pattern):
    model = originals["qwen2_moe"]
    scope = hf_optim.Scope("", model, model)
    name = "model.layers.0.mlp.shared_expert_gate"
    assert not topology.routes(model) & set(scope.select([pattern, "Linear"]))
    assert name in scope.select([pattern, name])


class DenseRouter(nn.Linear):
    """A router that is a linear layer, and returns one factor for each expert."""

    def forward(self, hidden):
        return torch.softmax(super().forward(hidden), dim=-1)


class SoftMixture(nn.Module):
    """All experts run; their outputs are summed with the router's factors. Its names say nothing."""

    def __init__(self, width: int, plain: bool) -> None:
        super().__init__()
        self.a = nn.Linear(width, 3, bias=False) if plain else DenseRouter(width, 3, bias=False)
        self.plain = plain
        self.b = nn.ModuleList(nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in range(3))

    def forward(self, hidden):
        factors = torch.softmax(self.a(hidden), dim=-1) if self.plain else self.a(hidden)
        return (torch.stack([expert(hidden) for expert in self.b], dim=-2) * factors.unsqueeze(-1)).sum(-2)


@pytest.mark.parametrize("plain", [True, False])
def test_a_soft_router_without_a_telling_name(plain):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = SoftMixture(32, plain)
    assert topology.routes(model) == {"model.layers.0.mlp.a", "model.layers.1.mlp.a"}


def test_the_config_names_routers_for_readers_that_build_them_as_linear_layers(tmp_path):
    model = hf_optim.optimize(tiny_mixtral(), {"technique": "rtn", "bits": 8, "format": "fp8"})
    model.save_pretrained(tmp_path)
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    for name in ("model.layers.0.mlp.gate", "model.layers.1.block_sparse_moe.gate"):
        assert any(entry.startswith("re:") and re.match(entry[3:], name) for entry in ignored)


def test_roles_do_not_need_the_dense_weights():
    model = tiny_mixtral()
    reference = topology.roles(tiny_mixtral())
    del model.model.layers[0].self_attn.q_proj._parameters["weight"]  # as in a loaded checkpoint, before it is decoded
    assert topology.roles(model) == reference
