"""Topology on one tiny model of each family, and that the exact transformations are exact."""

from __future__ import annotations

import copy

import pytest
import tiny_mixtures
import torch
from tiny_models import TINY, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_t5, tiny_vit
from torch import nn
from transformers import DeepseekV3ForCausalLM, FalconForCausalLM, Gemma2ForCausalLM, LlamaModel, Phi3ForCausalLM

from hf_optim.errors import ModelError
from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation.folding import move_norm_scale_, move_pair_scale_, permute_pair_

FAMILIES = sorted(TINY)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}


def seeded(cls, **changes):
    """A small random float64 model of any decoder class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(cls.config_class(**{**SMALL, **changes})).double().eval()


@pytest.fixture(scope="module")
def traces():
    """One trace for each tiny model."""
    return {name: topology.trace(build()) for name, build in TINY.items()}


def logits(model):
    """The main output of a float64 model on its dummy inputs; the fused expert kernels do not support float64."""
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        inputs = topology.dummy_inputs(model)
        return model(**inputs).to_tuple()[0]


def factors(count, seed=0):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5


def groups_of(trace):
    return {group.name: group for group in topology.find_norm_groups(trace)}


def pairs_of(trace):
    return {pair.consumer: pair for pair in topology.find_linear_pairs(trace)}


# --- inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_inputs_run(family):
    model = TINY[family]()
    first, second = topology.dummy_inputs(model), topology.dummy_inputs(model)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.isfinite(model(**first).to_tuple()[0]).all()


def test_dummy_inputs_of_each_kind():
    assert set(topology.dummy_inputs(tiny_llama())) == {"input_ids"}
    assert topology.dummy_inputs(tiny_llama())["input_ids"].shape == (1, 8)
    assert set(topology.dummy_inputs(tiny_t5())) == {"input_ids", "decoder_input_ids"}
    assert topology.dummy_inputs(tiny_vit())["pixel_values"].shape == (1, 3, 16, 16)
    assert topology.dummy_inputs(tiny_vit().bfloat16())["pixel_values"].dtype == torch.bfloat16
    tiny_vocabulary = tiny_llama(vocab_size=5)
    ids = topology.dummy_inputs(tiny_vocabulary)["input_ids"]
    assert int(ids.max()) < 5
    assert 0 not in ids


def test_dummy_inputs_refuses_unsupported_main_inputs():
    model = tiny_llama()
    model.main_input_name = "waves"
    with pytest.raises(topology.NoInputsError, match=r"'waves'.*pass calibration batches"):
        topology.dummy_inputs(model)


# --- linears ------------------------------------------------------------------------------------------------


def test_linears_and_their_orientation():
    gpt2 = tiny_gpt2()
    found = topology.linears(gpt2)
    assert len(found) == 2 * 4 + 1
    fused = found["transformer.h.0.attn.c_attn"]
    assert topology.weight_out_in(fused).shape == (96, 32) == topology.features(fused)
    with torch.no_grad():
        topology.weight_out_in(fused)[5] = 7.0
    assert (fused.weight[:, 5] == 7.0).all()
    assert topology.weight_out_in(nn.Linear(3, 2)).shape == (2, 3)
    with pytest.raises(TypeError, match="Embedding"):
        topology.weight_out_in(nn.Embedding(3, 2))


def test_output_heads(traces):
    def heads(family):
        model = traces[family].model
        return {name for name in topology.linears(model) if topology.is_output_head(model, name)}

    assert heads("llama") == {"lm_head"}
    assert heads("gpt2") == {"lm_head"}
    assert heads("t5") == {"lm_head"}
    assert heads("vit") == {"classifier"}
    assert heads("bert") == {"bert.pooler.dense", "classifier"}
    assert not topology.is_output_head(tiny_llama(), "model.norm")
    with pytest.raises(AttributeError):
        topology.is_output_head(tiny_llama(), "no_such_module")


def test_has_experts():
    assert [name for name in FAMILIES if topology.has_experts(TINY[name]())] == ["mixtral"]
    assert not topology.has_experts(nn.Linear(2, 2))
    assert topology.has_experts(tiny_mixtures.build("nllb-moe"))  # keeps a dropout beside its experts


# --- blocks -------------------------------------------------------------------------------------------------

BLOCK_LISTS = {
    "llama": ["model.layers"],
    "qwen2": ["model.layers"],
    "gpt2": ["transformer.h"],
    "opt": ["model.decoder.layers"],
    "bert": ["bert.encoder.layer"],
    "vit": ["vit.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "mixtral": ["model.layers"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks(family, traces):
    found = topology.blocks(traces[family])
    expected = [(name, index) for name in BLOCK_LISTS[family] for index in range(2)]
    assert [(block.list_name, block.index) for block in found] == expected
    assert [block.name for block in found] == [f"{name}.{index}" for name, index in expected]
    assert all(block.module is traces[family].model.get_submodule(block.name) for block in found)


def test_a_single_block_is_found_and_layers_that_do_not_run_are_left_out():
    assert [block.name for block in topology.blocks(tiny_llama(num_hidden_layers=1))] == ["model.layers.0"]
    model = tiny_llama()
    model.config.num_hidden_layers = 1
    assert [block.name for block in topology.blocks(model)] == ["model.layers.0"]


def test_blocks_are_searched_again_after_the_model_changed():
    model = tiny_llama()
    assert len(topology.blocks(model)) == 2
    del model.model.layers[0]
    model.config.num_hidden_layers = 1
    assert [block.name for block in topology.blocks(model)] == ["model.layers.0"]


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(self.up(x).relu())


class ExpertLayer(nn.Module):
    """A list of experts that all read the same tensor; which ones run depends on the data."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, 4)
        self.experts = nn.ModuleList(Expert(width) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        choice = self.router(normed).argmax(-1)
        y = torch.zeros_like(x)
        for number in choice.unique():
            y = y + self.experts[int(number)](normed) * (choice == number).unsqueeze(-1)
        return x + y


class ExpertModel(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.ModuleList(ExpertLayer(width) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def expert_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ExpertModel().eval()


def test_lists_of_experts_are_not_blocks_and_data_dependent_models_are_traced_on_real_weights(expert_model):
    trace = topology.trace(expert_model, args=(torch.ones(1, 6, 16),))
    assert trace.used_real_weights
    assert [block.name for block in topology.blocks(trace)] == ["layers.0", "layers.1", "layers.2"]


def test_linears_that_the_trace_did_not_reach_make_a_group_inexact(expert_model):
    group = topology.find_norm_groups(topology.trace(expert_model, args=(torch.ones(1, 6, 16),)))[0]
    assert "layers.0.router" in group.linears
    assert not group.exclusive
    assert any("experts" in other and "not reached" in other for other in group.others)


# --- norms --------------------------------------------------------------------------------------------------


def test_norm_groups_of_llama(traces):
    groups = groups_of(traces["llama"])
    assert list(groups) == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    attention = groups["model.layers.1.input_layernorm"]
    assert list(attention.linears) == [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert attention.module is traces["llama"].model.model.layers[1].input_layernorm
    mlp = groups["model.layers.0.post_attention_layernorm"]
    assert list(mlp.linears) == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert list(groups["model.norm"].linears) == ["lm_head"]
    assert all(group.exclusive and group.offset == 0.0 for group in groups.values())


def test_norm_groups_of_gpt2_and_its_tied_head(traces):
    groups = groups_of(traces["gpt2"])
    assert list(groups["transformer.h.0.ln_1"].linears) == ["transformer.h.0.attn.c_attn"]
    assert list(groups["transformer.h.0.ln_2"].linears) == ["transformer.h.0.mlp.c_fc"]
    assert not groups["transformer.ln_f"].exclusive
    assert groups["transformer.ln_f"].others == ("lm_head.weight: tied to transformer.wte.weight",)


def test_norm_groups_of_post_norm_bert_are_not_exclusive(traces):
    groups = groups_of(traces["bert"])
    layer = "bert.encoder.layer"
    output = groups[f"{layer}.0.output.LayerNorm"]
    assert list(output.linears) == [f"{layer}.1.attention.self.{name}" for name in ("query", "key", "value")]
    assert output.others == (f"{layer}.1.attention.output: add",)
    assert [name for name, group in groups.items() if group.exclusive] == [f"{layer}.1.output.LayerNorm"]


def test_cross_attention_of_t5_reads_the_encoders_final_norm(traces):
    final = groups_of(traces["t5"])["encoder.final_layer_norm"]
    assert list(final.linears) == [f"decoder.block.{i}.layer.1.EncDecAttention.{name}" for i in (0, 1) for name in "kv"]
    assert final.exclusive


def test_router_and_experts_of_mixtral_read_the_norm_too(traces):
    group = groups_of(traces["mixtral"])["model.layers.0.post_attention_layernorm"]
    assert not group.exclusive
    assert not group.linears
    assert any(other.startswith("model.layers.0.mlp.gate:") for other in group.others)
    assert any(other.startswith("model.layers.0.mlp.experts:") for other in group.others)
    assert groups_of(traces["mixtral"])["model.layers.0.input_layernorm"].exclusive


def test_a_norm_that_is_the_models_output_is_not_exclusive():
    model = seeded(LlamaModel, num_hidden_layers=1)
    assert [group.name for group in topology.find_norm_groups(model)] == [
        "layers.0.input_layernorm",
        "layers.0.post_attention_layernorm",
    ]


def test_norms_of_one_block_only(traces):
    block = topology.blocks(traces["llama"])[1]
    names = [group.name for group in topology.find_norm_groups(traces["llama"], block)]
    assert names == ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"]


def test_moving_the_scale_of_a_norm_with_other_readers_is_refused(traces):
    group = groups_of(traces["bert"])["bert.embeddings.LayerNorm"]
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0\.attention\.output: add"):
        move_norm_scale_(group, factors(32))


# --- pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_pairs_with_grouped_heads_and_gates(family, traces):
    pairs = pairs_of(traces[family])
    assert set(pairs) == {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}
    value = pairs["model.layers.0.self_attn.o_proj"]
    head = torch.arange(8)
    assert value.producer == "model.layers.0.self_attn.v_proj"
    assert torch.equal(value.index, torch.cat([head, head, head + 8, head + 8]))
    assert (value.index.dtype, value.repeat, value.scalable) == (torch.int64, 2, True)
    assert torch.equal(value.groups, torch.arange(2).repeat_interleave(8))
    assert value.permutable_with == ()
    up = pairs["model.layers.0.mlp.down_proj"]
    assert up.producer == "model.layers.0.mlp.up_proj"
    assert torch.equal(up.index, torch.arange(48))
    assert (up.scalable, up.repeat) == (True, 1)
    assert (up.groups == 0).all()
    (gate,) = up.permutable_with
    assert gate.name == "model.layers.0.mlp.gate_proj"
    assert torch.equal(gate.rows, torch.arange(48))


def test_the_values_of_gpt2_are_the_last_third_of_a_fused_projection(traces):
    pairs = pairs_of(traces["gpt2"])
    value = pairs["transformer.h.1.attn.c_proj"]
    assert value.producer == "transformer.h.1.attn.c_attn"
    assert torch.equal(value.index, torch.arange(64, 96))
    assert torch.equal(value.groups, torch.arange(4).repeat_interleave(8))
    assert value.scalable
    mlp = pairs["transformer.h.1.mlp.c_proj"]
    assert (mlp.producer, mlp.scalable) == ("transformer.h.1.mlp.c_fc", False)
    assert (mlp.groups == 0).all()


@pytest.mark.parametrize(
    ("family", "consumer", "producer", "scalable"),
    [
        ("opt", "model.decoder.layers.0.fc2", "model.decoder.layers.0.fc1", True),
        ("opt", "model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.self_attn.v_proj", True),
        ("bert", "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.intermediate.dense", False),
        (
            "bert",
            "bert.encoder.layer.0.attention.output.dense",
            "bert.encoder.layer.0.attention.self.value",
            True,
        ),
        ("bert", "classifier", "bert.pooler.dense", False),
        ("vit", "vit.layers.1.attention.o_proj", "vit.layers.1.attention.v_proj", True),
        ("vit", "vit.layers.1.mlp.fc2", "vit.layers.1.mlp.fc1", False),
        (
            "t5",
            "encoder.block.0.layer.1.DenseReluDense.wo",
            "encoder.block.0.layer.1.DenseReluDense.wi",
            True,
        ),
        (
            "t5",
            "decoder.block.1.layer.1.EncDecAttention.o",
            "decoder.block.1.layer.1.EncDecAttention.v",
            True,
        ),
        ("mixtral", "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.v_proj", True),
    ],
)
def test_a_pair(family, consumer, producer, scalable, traces):
    pair = pairs_of(traces[family])[consumer]
    assert (pair.producer, pair.scalable) == (producer, scalable)
    assert pair.producer_module is traces[family].model.get_submodule(producer)
    assert pair.consumer_module is traces[family].model.get_submodule(consumer)


def test_number_of_linear_pairs(traces):
    counts = {family: len(topology.find_linear_pairs(traces[family])) for family in FAMILIES}
    assert counts == {
        "bert": 5,
        "gpt2": 4,
        "llama": 4,
        "mixtral": 2,
        "opt": 4,
        "qwen2": 4,
        "t5": 10,
        "vit": 4,
    }
    block = topology.blocks(traces["llama"])[1]
    assert [pair.consumer for pair in topology.find_linear_pairs(traces["llama"], block)] == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_rescaling_pairs_that_are_not_scalable_is_refused(family, traces):
    for pair in topology.find_linear_pairs(traces[family]):
        if not pair.scalable:
            with pytest.raises(ValueError, match="not homogeneous"):
                move_pair_scale_(pair, factors(pair.groups.numel()))


def test_permutations_across_heads_are_refused(traces):
    pair = pairs_of(traces["llama"])["model.layers.0.self_attn.o_proj"]
    with pytest.raises(ValueError, match="out of their groups"):
        permute_pair_(pair, torch.arange(16).flip(0))
    with pytest.raises(ValueError, match="not a permutation"):
        permute_pair_(pair, torch.zeros(16, dtype=torch.int64))


# --- exactness ---------------------------------------------------------------------------------------


def check_exactness(model, tolerance=1e-10):
    """Fold a scale out of every exclusive norm, scale and permute every pair: the logits stay."""
    trace = topology.trace(model)
    norms = [group for group in topology.find_norm_groups(trace) if group.exclusive]
    pairs = topology.find_linear_pairs(trace)
    before = logits(model)
    for seed, group in enumerate(norms):
        move_norm_scale_(group, factors(group.module.weight.numel(), seed))
    assert torch.allclose(logits(model), before, rtol=0, atol=tolerance)
    for pair in pairs:
        if pair.scalable:
            move_pair_scale_(pair, factors(pair.groups.numel()))
    assert torch.allclose(logits(model), before, rtol=0, atol=tolerance)
    for pair in pairs:
        permute_pair_(pair, shuffle_within(pair.groups))
    assert torch.allclose(logits(model), before, rtol=0, atol=tolerance)
    return norms, pairs


def shuffle_within(groups):
    """A permutation, not the identity, that moves rows inside their groups."""
    order = torch.arange(groups.numel())
    for number in groups.unique():
        members = (groups == number).nonzero().flatten()
        order[members] = members[torch.randperm(members.numel(), generator=torch.Generator().manual_seed(0))]
    assert not torch.equal(order, torch.arange(groups.numel()))
    return order


@pytest.mark.many(every=4)
@pytest.mark.parametrize("family", FAMILIES)
def test_exactness(family):
    norms, pairs = check_exactness(TINY[family]().double())
    assert norms
    assert pairs


def test_exactness_of_norms_with_an_offset_gain():
    norms, pairs = check_exactness(
        seeded(Gemma2ForCausalLM, head_dim=8), tolerance=1e-6
    )  # these norms compute in float32
    assert [group.offset for group in norms] == [1.0] * 5
    assert len(pairs) == 4


@pytest.mark.parametrize(("cls", "changes"), [(FalconForCausalLM, {}), (DeepseekV3ForCausalLM, MLA)])
def test_exactness_with_other_attentions(cls, changes):
    """One key/value head for all, selected by an index; values compressed together with a part of the keys."""
    _, pairs = check_exactness(seeded(cls, **changes))
    assert len([pair for pair in pairs if pair.scalable]) >= 2
    assert pairs[0].producer.endswith(("query_key_value", "kv_b_proj"))


def test_fused_gate_and_up_projection_is_its_own_partner():
    model = seeded(Phi3ForCausalLM, num_key_value_heads=2, num_hidden_layers=1)
    value, mlp = topology.find_linear_pairs(model)
    assert torch.equal(value.rows, torch.arange(48, 64))
    assert torch.equal(mlp.index, torch.arange(48, 96))
    assert [partner.name for partner in mlp.permutable_with] == [mlp.producer]
    assert torch.equal(mlp.permutable_with[0].rows, torch.arange(48))
    check_exactness(model)


# --- coverage -----------------------------------------------------------------------------------------------


def test_coverage_of_llama():
    model = tiny_llama()
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    vectors = 5 * 32
    inside = [name for name in topology.linears(model) if not topology.is_output_head(model, name)]
    full = topology.coverage(model, inside)
    assert (full.covered, full.block_linears, full.block_weights) == (2 * block,) * 3
    assert full.total == 2 * block + 2 * 64 * 32 + vectors == sum(p.numel() for p in model.parameters())
    assert full.fraction == 1.0
    assert {item.reason: item.weights for item in full.skipped} == {
        "Linear outside the blocks": 64 * 32,
        "2-D parameter of Embedding": 64 * 32,
        "norms, biases and other vectors": vectors,
    }
    one = topology.coverage(model, ["model.layers.0.mlp.up_proj"])
    assert one.covered == 48 * 32
    assert one.fraction == 48 * 32 / (2 * block)
    with pytest.raises(ValueError, match="up_proj"):
        topology.coverage(model, ["model.layers.0.mlp.up_proy"])


def test_coverage_names_expert_tensors_and_conv1d():
    mixtral = tiny_mixtral()
    attention = [name for name in topology.linears(mixtral) if "self_attn" in name]
    found = topology.coverage(mixtral, attention)
    assert found.covered == found.block_linears == 2 * (2 * 32 * 32 + 2 * 16 * 32)
    skipped = {item.reason: item for item in found.skipped}
    assert skipped["3-D parameter of MixtralExperts"].weights == 2 * 4 * (96 * 32 + 32 * 48)
    assert "model.layers.0.mlp.experts.gate_up_proj" in skipped["3-D parameter of MixtralExperts"].names
    assert skipped["2-D parameter of MixtralTopKRouter"].weights == 2 * 4 * 32
    assert 0 < found.fraction < 0.2
    assert "MixtralExperts" in str(found)
    everything = topology.coverage(mixtral, ["model.layers.0", "model.layers.1"])
    assert everything.fraction == 1.0

    gpt2 = topology.coverage(tiny_gpt2(), [])
    assert {item.reason: len(item.names) for item in gpt2.skipped}["Conv1D in the blocks"] == 8
    assert gpt2.total == sum(parameter.numel() for parameter in tiny_gpt2().parameters())


# --- match --------------------------------------------------------------------------------------------------


def test_match():
    model = tiny_llama()
    modules = topology.linears(model)
    assert topology.match(modules, ["model.layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj"]
    assert len(topology.match(list(modules), ["*.mlp.*"])) == 6
    assert len(topology.match(list(modules), ["re:.*layers\\.0\\..*_proj$"])) == 7
    assert len(topology.match(modules, ["Linear"], skip=["lm_head", "*.down_proj"])) == 12
    assert topology.match(modules, ["*.1.mlp.*", "*.0.mlp.*"]) == topology.match(modules, ["*.mlp.*"])
    assert len(topology.match(topology.linears(tiny_gpt2()), ["Linear"])) == 9
    assert len(topology.match(topology.linears(tiny_gpt2()), ["Conv1D"])) == 8
    assert topology.match(modules, []) == []


def test_match_raises_for_patterns_that_match_nothing():
    modules = topology.linears(tiny_llama())
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_prjo' \(nearest: model\.layers\.0\.mlp\.up_proj"):
        topology.match(modules, ["Linear", "model.layers.0.mlp.up_prjo"])
    with pytest.raises(ValueError, match="'LayerNrom'"):
        topology.match(modules, ["Linear"], skip=["LayerNrom"])
    assert topology.match(modules, ["lm_head"], skip=["score"], optional=["score"]) == ["lm_head"]


# --- the model is unchanged ---------------------------------------------------------------------------------


def hooks_of(model):
    return [
        (name, hooks)
        for name, module in model.named_modules()
        for hooks, value in vars(module).items()
        if "_hooks" in hooks and isinstance(value, dict) and value
    ]


def analyse(model):
    trace = topology.trace(model)
    topology.blocks(trace)
    topology.find_norm_groups(trace)
    topology.find_linear_pairs(trace)


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral", "t5"])
def test_analysis_leaves_the_model_unchanged(family):
    model = TINY[family]().train()
    next(model.children()).eval()
    config = copy.deepcopy(model.config.to_dict())
    attention = model.config._attn_implementation
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    attributes = [set(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    analyse(model)
    assert calls == []
    assert len(hooks_of(model)) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == attention
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_analysis_leaves_the_model_unchanged_if_the_forward_raises(monkeypatch):
    model = tiny_llama().train()

    def broken(self, *args, **kwargs):
        raise KeyError("broken on purpose")

    monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", broken)
    random = torch.get_rng_state()
    with pytest.raises(topology.NoInputsError, match=r"KeyError: 'broken on purpose'.*pass calibration batches"):
        topology.trace(model)
    assert hooks_of(model) == []
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    with pytest.raises(ModelError, match=r"has no weights.*load its weights"):
        topology.trace(model.to("meta"))


def test_results_are_deterministic_and_do_not_depend_on_weights():
    def summary(model):
        trace = topology.trace(model)
        assert not trace.used_real_weights
        norms = [(group.name, list(group.linears), group.others) for group in topology.find_norm_groups(trace)]
        pairs = [
            (pair.producer, pair.consumer, pair.index.tolist(), pair.groups.tolist(), pair.scalable)
            for pair in topology.find_linear_pairs(trace)
        ]
        return norms, pairs

    first = summary(tiny_llama())
    zero = tiny_llama(seed=1).bfloat16()
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    assert summary(zero) == first
    meta = tiny_gpt2().to("meta")
    meta.tie_weights()
    assert summary(meta) == summary(tiny_gpt2())


def test_a_single_block_can_be_traced_with_its_inputs():
    layer = tiny_opt().model.decoder.layers[0]
    trace = topology.trace(layer, args=(torch.zeros(1, 4, 32),))
    assert [group.name for group in topology.find_norm_groups(trace)] == [
        "self_attn_layer_norm",
        "final_layer_norm",
    ]
    assert [pair.consumer for pair in topology.find_linear_pairs(trace)] == ["self_attn.out_proj", "fc2"]
    with pytest.raises(ValueError, match="pass the inputs"):
        topology.trace(layer)
