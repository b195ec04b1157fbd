"""What routes is found by what it does: in every mixture of the installed transformers, and in no dense model.

What is found is compared with what happens when each layer is replaced (``routing_by_effect``).
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from typing import Any

import custom_mixtures
import pytest
import routing_by_effect
import tiny_mixtures
import torch
from tiny_models import TINY, tiny_llama, tiny_mixtral
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BertConfig, BertForMultipleChoice

import hf_optim
from hf_optim.toolkit import topology
from hf_optim.toolkit.topology import Role

ROUTING: dict[str, set[str]] = {
    "phimoe": {"model.layers.*.mlp.router"},
    "jetmoe": {"model.layers.*.mlp.router.layer", "model.layers.*.self_attention.experts.router.layer"},
    "llama4_text": {"model.layers.*.feed_forward.router"},
    "qwen2_moe": {"model.layers.*.mlp.gate", "model.layers.*.mlp.shared_expert_gate"},
    "gemma4_text": {"model.layers.*.router.proj"},
}
"""What routes in the mixtures that techniques are run on, as their sources say."""

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


def general(names: Any) -> set[str]:
    return {re.sub(r"\.\d+", ".*", name) for name in names}


def routing(model: Any) -> dict[str, str]:
    roles = topology.roles(model).items()
    return {name: str(role) for name, role in roles if role in (Role.ROUTER, Role.SHARED_EXPERT_GATE)}


def test_every_mixture_of_transformers_is_tested():
    built = {package for package, _ in tiny_mixtures.classes().values()}
    assert set(tiny_mixtures.packages()) == built
    assert len(built) >= 55


@pytest.mark.many
@pytest.mark.parametrize("kind", tiny_mixtures.classes())
def test_what_routes_is_what_changes_the_choice_of_experts(kind):
    if kind == "inkling_mm_model":
        pytest.importorskip("scipy", reason="its vision tower needs scipy")
    model = tiny_mixtures.build(kind)
    try:
        routing_by_effect.run(model)
    except Exception as error:
        pytest.skip(f"the forward of this version of transformers fails: {error}")
    truth, ran = routing_by_effect.find(model)
    assert ran or kind == "granite_docling"  # it routes images, not tokens
    with contextlib.suppress(topology.NoInputsError):
        traced = topology.trace(model)
        assert routing(traced) == truth
        if not traced.used_real_weights:  # the trace without weights is the same
            return
    assert routing(model) == truth
    assert routing(tiny_mixtures.build(kind, "meta")) == truth


@pytest.mark.many(every=4)
@pytest.mark.parametrize("kind", ["deepseek_v32", "qwen4_exp_text", "nemotron_h", "laguna", "doge", "glm4v_moe"])
def test_sizes_that_coincide_do_not_make_a_router(kind, monkeypatch):
    same = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "index_n_heads"}
    monkeypatch.setattr(tiny_mixtures, "SIZES", tiny_mixtures.SIZES | dict.fromkeys(same, 64) | {"index_head_dim": 16})
    model = tiny_mixtures.build(kind, "meta")
    other = routing(model)
    monkeypatch.undo()
    assert other == routing(tiny_mixtures.build(kind, "meta"))


@pytest.mark.many
@pytest.mark.parametrize("kind", DENSE)
def test_nothing_routes_in_a_dense_model(kind):
    try:
        config = CONFIG_MAPPING[kind](**tiny_mixtures.sizes(CONFIG_MAPPING[kind], {}))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval()
        topology.trace(model)
    except Exception as error:
        pytest.skip(f"these sizes do not suit it, or it has no trace without weights: {error}")
    assert not topology.routes(model)


def test_roles_of_the_tiny_models():
    for family, build in TINY.items():
        found = general(topology.routes(build()))
        assert found == ({"model.layers.*.mlp.gate"} if family == "mixtral" else set())


STEPS: dict[str, dict[str, Any]] = {
    "rtn": {"technique": "rtn", "bits": 4, "group_size": 16},
    "fp8": {"technique": "rtn", "bits": 8, "format": "fp8"},
    "gptq": {"technique": "gptq", "bits": 4, "group_size": 16},
    "nm": {"technique": "nm"},
    "magnitude": {"technique": "magnitude"},
}


REFUSED = {(kind, step) for kind in ("jetmoe", "llama4_text", "gemma4_text") for step in ("rtn", "gptq")}
REFUSED.add(("llama4_text", "fp8"))  # stock transformers replaces its experts before it reads a checkpoint


@pytest.fixture(scope="module")
def originals():
    return {kind: tiny_mixtures.build(kind) for kind in ROUTING}


@pytest.mark.many
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ROUTING)
def test_no_technique_changes_what_routes(originals, kind, step):
    model = copy.deepcopy(originals[kind])
    names = [name for name, _ in model.named_parameters() if general([name.rpartition(".")[0]]) <= ROUTING[kind]]
    before = {name: model.get_parameter(name).clone() for name in names}
    assert before
    calibration = [{"input_ids": torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))}]
    if (kind, step) in REFUSED:
        with pytest.raises(hf_optim.OptimError, match="experts"):  # the checkpoint could not be read back
            hf_optim.optimize(model, [STEPS[step]], calibration=calibration)
        return
    model = hf_optim.optimize(model, [STEPS[step]], calibration=calibration)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
    (coverage,) = hf_optim.run_of(model).record.coverage.values()
    assert general(coverage["skipped"]["router"]) <= ROUTING[kind]


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


class Unfinished(nn.Module):
    """A router whose forward needs the values of its scores before it chooses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 48), nn.Linear(48, width)) for _ in range(4))

    def forward(self, hidden):
        scores = self.gate(hidden)
        if bool(scores.max() > 1e6):
            raise ValueError("too large")
        best = scores.argmax(-1, keepdim=True)
        return sum((best == index) * expert(hidden) for index, expert in enumerate(self.experts))


def with_mixtures(kind: type[nn.Module], **settings: Any) -> Any:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = kind(32)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.many(every=4)
@pytest.mark.parametrize("kind", custom_mixtures.ROUTING)
def test_what_routes_in_mixtures_that_are_not_of_transformers(kind):
    expected = {f"model.layers.{index}.mlp{name}" for index in (0, 1) for name in custom_mixtures.ROUTING[kind]}
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = kind()
    assert topology.routes(model) == expected
    assert topology.routes(model.to("meta")) == expected


def test_a_router_whose_choice_was_not_traced_is_judged_by_name_and_size():
    gates = {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert topology.routes(with_mixtures(Unfinished)) == gates
    assert topology.routes(with_mixtures(Unfinished, num_experts=4).to("meta")) == gates


class Broken(Unfinished):
    def forward(self, hidden):
        raise KeyError("needs a library that is not installed")


@pytest.mark.parametrize("step", [{"technique": "rtn", "bits": 8, "format": "fp8"}, {"technique": "magnitude"}])
def test_a_model_that_cannot_be_traced_is_not_an_error_and_its_routers_are_left_alone(step, caplog, monkeypatch):
    model = with_mixtures(Unfinished, num_experts=4)
    before = [layer.mlp.gate.weight.clone() for layer in model.model.layers]
    expert = model.model.layers[0].mlp.experts[0][0].weight.clone()
    monkeypatch.setattr(Unfinished, "forward", Broken.forward)
    assert topology.routes(model) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert "could not be traced (NoInputsError" in caplog.text
    assert "list it under skip" in caplog.text
    assert topology.is_output_head(model, "lm_head")
    model = hf_optim.optimize(model, step)
    assert all(torch.equal(layer.mlp.gate.weight, old) for layer, old in zip(model.model.layers, before, strict=True))
    assert not torch.equal(model.model.layers[0].mlp.experts[0][0].weight, expert)


def test_an_error_in_the_analysis_does_not_fail_the_run(monkeypatch, caplog):
    model = with_mixtures(Unfinished, num_experts=4)
    monkeypatch.setattr("hf_optim.toolkit.topology.routing._Finder.find", lambda self: 1 / 0)
    assert topology.routes(model) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert "could not be traced (ZeroDivisionError" in caplog.text


def test_a_model_that_chooses_between_texts_is_traced():
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = BertForMultipleChoice(config).eval()
        assert [block.name for block in topology.blocks(model)] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
        assert topology.is_output_head(model, "classifier")
