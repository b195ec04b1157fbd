"""Structural pruning: the configuration is found, modules match it, and what it cannot express is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import DECODER, TINY, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_t5
from torch import nn

from hf_optim import ModelError
from hf_optim.toolkit.modules.compare import main_output
from hf_optim.toolkit.pruning import shrink as shrinking
from hf_optim.toolkit.pruning.shrink import Slicing
from hf_optim.toolkit.topology.fake_inputs import dummy_inputs


def halve_neurons(model, layers=2):
    """The first 24 of 48 neurons of a Llama-like model."""
    kept = torch.arange(24)
    names = [f"model.layers.{index}.mlp" for index in range(layers)]
    stays = {f"{name}.{leaf}.weight": {0: kept} for name in names for leaf in ("gate_proj", "up_proj")}
    return Slicing(stays | {f"{name}.down_proj.weight": {1: kept} for name in names}, {48: 24}, 24)


def shrink(model, slicings=(), kept_blocks=None):
    plan = shrinking.plan(model, slicings, kept_blocks)
    shrinking.apply_(model, plan)
    return plan


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def test_a_sliced_model_is_the_same_object_with_another_configuration(tmp_path):
    model = tiny_llama()
    config, layer, weight = (
        model.config,
        model.model.layers[0].mlp.down_proj,
        model.model.layers[0].mlp.down_proj.weight,
    )
    before = weight.detach().clone()
    shrink(model, [halve_neurons(model)])
    assert model.config is config
    assert config.intermediate_size == 24
    assert layer is model.model.layers[0].mlp.down_proj
    assert layer.weight is weight
    assert (layer.in_features, model.model.layers[1].mlp.intermediate_size) == (24, 24)
    assert torch.equal(weight, before[:, :24])
    inputs = dummy_inputs(model)
    assert torch.equal(main_output(reloaded(model, tmp_path), inputs), main_output(model, inputs))


def test_planning_changes_nothing():
    model = tiny_llama()
    before, rng = main_output(model, dummy_inputs(model)), torch.random.get_rng_state()
    shrinking.plan(model, [halve_neurons(model)], {"model.layers": [1]})
    assert model.config.num_hidden_layers == 2
    assert torch.equal(main_output(model, dummy_inputs(model)), before)
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_layers_are_renumbered_and_keep_their_type():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_qwen2(num_hidden_layers=4, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    kept = list(model.model.layers)[1:3]
    plan = shrink(model, kept_blocks={"model.layers": [1, 2]})
    assert list(model.model.layers) == kept
    assert [layer.self_attn.layer_idx for layer in kept] == [0, 1]
    assert model.config.layer_types == kinds[1:3]
    assert [layer.self_attn.sliding_window for layer in kept] == [4, None]
    assert plan.new_name("model.layers.2.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert plan.new_name("model.layers.3.mlp") is None
    assert plan.new_name("model.norm") == "model.norm"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "mixtral", "t5"])
def test_the_cache_works_after_layers_are_removed(family):
    """Decoding with the cache gives the tokens that decoding without it gives."""
    model = TINY[family](**({"n_layer": 3} if family == "gpt2" else {}))
    kept_blocks = {
        "gpt2": {"transformer.h": [0, 2]},
        "opt": {"model.decoder.layers": [1]},
        "t5": {"encoder.block": [0], "decoder.block": [0]},
    }.get(family, {"model.layers": [1]})
    shrink(model, kept_blocks=kept_blocks)
    prompt = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(1))
    cached, plain = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use, eos_token_id=-1)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_a_layer_keeps_its_rotary_setting(tmp_path):
    """SmolLM3 has a list of the layers without rotary embeddings in its configuration."""
    config = transformers.SmolLM3Config(**DECODER | {"num_hidden_layers": 4}, no_rope_layer_interval=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.SmolLM3ForCausalLM(config).eval()
    turned = [layer.self_attn.use_rope for layer in model.model.layers]
    assert len(set(turned)) == 2
    shrink(model, kept_blocks={"model.layers": [1, 2, 3]})
    assert [layer.self_attn.use_rope for layer in model.model.layers] == turned[1:]
    inputs = dummy_inputs(model)
    assert torch.equal(main_output(reloaded(model, tmp_path), inputs), main_output(model, inputs))


def test_lists_of_the_same_length_by_chance_do_not_change(tmp_path):
    model = tiny_llama(num_hidden_layers=3, eos_token_id=[2, 5, 7])
    model.config.favourite_numbers = [1, 2, 3]
    plan = shrink(model, kept_blocks={"model.layers": [0, 2]})
    assert model.config.num_hidden_layers == 2
    assert model.config.eos_token_id == plan.after.config.eos_token_id == [2, 5, 7]
    assert model.config.favourite_numbers == [1, 2, 3]
    assert reloaded(model, tmp_path).config.eos_token_id == [2, 5, 7]


class Shares(transformers.LlamaForCausalLM):
    """A list with a neutral name determines its blocks, as ``activation_sparsity_pattern`` does in Gemma3n."""

    def __init__(self, config):
        super().__init__(config)
        for layer, share in zip(self.model.layers, config.shares, strict=False):
            layer.mlp.share = share


def test_a_list_that_determines_blocks_is_sliced_whatever_its_name(tmp_path):
    config = tiny_llama(num_hidden_layers=3, eos_token_id=[2, 5, 7]).config
    config.shares, config.favourite_numbers = [0.5, 0.0, 0.25], [1, 2, 3]
    model = Shares(config).eval()
    shrink(model, kept_blocks={"model.layers": [1, 2]})
    assert model.config.shares == [layer.mlp.share for layer in model.model.layers] == [0.0, 0.25]
    assert model.config.favourite_numbers == [1, 2, 3]
    assert model.config.eos_token_id == [2, 5, 7]
    assert reloaded(model, tmp_path).model.layers[1].mlp.share == 0.25


def test_a_layer_that_would_change_is_refused():
    """Qwen2-MoE lists its dense layers by index."""
    fields = {
        **DECODER, "num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**fields)).eval()
    with pytest.raises(ModelError, match="no configuration of Qwen2MoeForCausalLM"):
        shrinking.plan(model, [], {"model.layers": [1, 2]})
    assert shrinking.removable_blocks(model) == {"model.layers": []}


def test_shapes_that_no_configuration_gives_are_refused():
    model = tiny_llama()
    slicing = halve_neurons(model, layers=1)
    with pytest.raises(ModelError, match="no configuration of LlamaForCausalLM gives the smaller shapes"):
        shrinking.plan(model, [slicing])
    assert model.model.layers[0].mlp.up_proj.weight.shape == (48, 32)


def test_a_field_that_is_none_can_be_set(tmp_path):
    """The feed-forward width of GPT-2 is four times its hidden size if ``n_inner`` is None."""
    model, kept = tiny_gpt2(), torch.arange(0, 128, 2)
    stays = {}
    for index in range(2):
        name = f"transformer.h.{index}.mlp"
        stays |= {f"{name}.c_fc.weight": {1: kept}, f"{name}.c_fc.bias": {0: kept}, f"{name}.c_proj.weight": {0: kept}}
    shrink(model, [Slicing(stays, {128: 64}, 64)])
    assert model.config.n_inner == 64
    assert model.transformer.h[0].mlp.c_fc.nf == 64
    inputs = dummy_inputs(model)
    assert torch.equal(main_output(reloaded(model, tmp_path), inputs), main_output(model, inputs))


def test_a_model_that_is_not_what_its_configuration_builds_is_refused():
    class Other(nn.Linear):
        pass

    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = Other(32, 48, bias=False)
    with pytest.raises(ModelError, match="not what its configuration builds"):
        shrinking.plan(model, [halve_neurons(model)])


def test_a_block_with_parameters_that_others_do_not_have_cannot_be_removed():
    assert shrinking.removable_blocks(tiny_t5(num_layers=3)) == {"encoder.block": [1, 2], "decoder.block": [1]}
    assert shrinking.removable_blocks(tiny_llama()) == {"model.layers": [0, 1]}
