"""Channel permutations: the function stays, the kept sum grows, and only exact permutations are applied."""

from __future__ import annotations

import math

import pytest
import torch
from real_stories import mean_loss, windows
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral
from transformers import BertModel

import hf_optim
from hf_optim import ModelError, NumericalError, OptimConfig, RecipeError, run_of
from hf_optim.recipes.traits import SPARSE
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.permutation import permutation_sites
from hf_optim.toolkit.pruning import masks
from hf_optim.toolkit.topology.experts import expert_linears
from hf_optim.toolkit.topology.linear_layers import linears, weight_out_in

NAME = "channel_permutation"
QUICK = {"tries": 0, "starts": 8}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def doubled(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def weights(model):
    layers = {**linears(model), **expert_linears(model)}
    return {name: weight_out_in(layer).detach().clone() for name, layer in layers.items()}


def kept(weight, keep=2, group=4):
    return float((weight.abs() * masks.nm_mask(weight, keep, group)).sum(dtype=torch.float64))


def permuted(model, **fields):
    return hf_optim.optimize(model, {"technique": NAME, **QUICK, **fields})


def column_order(before, after):
    """Return the order of columns that turns ``before`` into ``after``, for any order of the rows."""
    old, new = before.double().sort(0).values, after.double().sort(0).values
    return torch.cdist(new.T, old.T).argmin(1)


@pytest.mark.many
@pytest.mark.parametrize("where", permutation_sites.SITE_KINDS)
@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "vit"])
def test_outputs_are_the_same_in_float64(family, where):
    model = TINY[family]().double()
    inputs, dense = doubled(inputs_for(model)), weights(model)
    before = logits(model, inputs)
    model = permuted(model, where=[where])
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=1e-12 * float(before.abs().max()))
    assert any(not torch.equal(weight, dense[name]) for name, weight in weights(model).items())


@pytest.mark.many
@pytest.mark.parametrize("where", permutation_sites.SITE_KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "t5", "mixtral"])
def test_outputs_are_the_same_with_norms_in_float32(family, where):
    if (family, where) == ("mixtral", "neurons"):
        pytest.skip("its experts are fused")
    # The products of experts know no float64.
    model = TINY[family]() if family == "mixtral" else TINY[family]().double()
    inputs, dense = inputs_for(model), weights(model)
    before = logits(model, inputs)
    model = permuted(model, where=[where])
    # Where only sums inside float64 layers change, float64 is reached; a new order of the stream passes the norms.
    bound = 1e-5 if family == "mixtral" else 1e-6 if where == "residual" else 1e-12
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=bound * float(before.abs().max()))
    assert any(not torch.equal(weight, dense[name]) for name, weight in weights(model).items())


@pytest.mark.many
@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8)])
def test_the_kept_sum_grows_and_is_reported(family, keep, group):
    model = TINY[family]()
    dense = weights(model)
    model = permuted(model, keep=keep, group=group)
    run, after = run_of(model), weights(model)
    up_projections = {name for name in expert_linears(model) if name.endswith("gate_up_proj")}
    figures = run.record.steps["0"]
    names = figures["kept_before_by_layer"].keys()
    assert up_projections == {name for name in names if "experts" in name}
    old, new = (sum(kept(weight[name], keep, group) for name in names) for weight in (dense, after))
    total = sum(float(dense[name].abs().sum(dtype=torch.float64)) for name in names)
    # Of a mixture most of the sum is that of experts, which all share one order of the residual stream.
    assert new > (1.002 if family == "mixtral" else 1.005) * old
    assert figures["kept_before"] == pytest.approx(old / total, abs=2e-6)
    assert figures["kept_after"] == pytest.approx(new / total, abs=2e-6)
    assert 0.05 < figures["efficacy"] < 1
    assert 0 < figures["layers_permuted"] <= len(run.covered(run.recipe.steps[0])[0]) == len(names)
    assert 0 < figures["orders_used"] <= figures["orders_searched"]
    for name in names:
        share = kept(after[name], keep, group) / float(after[name].abs().sum(dtype=torch.float64))
        assert figures["kept_after_by_layer"][name] == pytest.approx(share, abs=2e-6)


def test_a_llama_is_permuted_exactly_where_that_is_exact():
    model = tiny_llama()
    dense = weights(model)
    after = weights(permuted(model))
    layer = "model.layers.0"
    stream = column_order(dense["lm_head"], after["lm_head"])
    assert not torch.equal(stream, torch.arange(32))
    # One order of the stream for all that read it or write it; the rows of q and k stay where they are.
    for part in ("q_proj", "k_proj"):
        name = f"{layer}.self_attn.{part}"
        assert torch.equal(after[name], dense[name][:, stream])
    name = f"{layer}.self_attn.v_proj"
    values = column_order(dense[name].T[stream], after[name].T)
    assert torch.equal(after[name], dense[name][:, stream][values])
    neurons = column_order(dense[f"{layer}.mlp.down_proj"], after[f"{layer}.mlp.down_proj"])
    assert torch.equal(after[f"{layer}.mlp.down_proj"], dense[f"{layer}.mlp.down_proj"][stream][:, neurons])
    for part in ("gate_proj", "up_proj"):
        name = f"{layer}.mlp.{part}"
        assert torch.equal(after[name], dense[name][neurons][:, stream])


def test_values_stay_in_their_head_and_query_heads_of_a_group_share_the_order():
    model = tiny_llama()
    dense = weights(model)
    after = weights(permuted(model, where=["values"]))
    name = "model.layers.0.self_attn"
    rows = column_order(dense[f"{name}.v_proj"].T, after[f"{name}.v_proj"].T)
    columns = column_order(dense[f"{name}.o_proj"], after[f"{name}.o_proj"])
    assert not torch.equal(rows, torch.arange(16))
    for head in range(2):  # key/value heads of 8 channels, each read by two query heads
        order = rows[8 * head : 8 * head + 8] - 8 * head
        assert torch.equal(order.sort().values, torch.arange(8))
        for query in (2 * head, 2 * head + 1):
            assert torch.equal(columns[8 * query : 8 * query + 8], order + 8 * query)


def test_the_query_and_key_parts_of_a_fused_projection_stay():
    model = tiny_gpt2()
    dense = weights(model)
    after = weights(permuted(model, where=["values"]))
    name = "transformer.h.0.attn.c_attn"
    assert torch.equal(after[name][:64], dense[name][:64])
    assert not torch.equal(after[name][64:], dense[name][64:])


def test_queries_and_keys_are_refused():
    with pytest.raises(RecipeError, match=r"where must be among neurons, values, residual.*queries.*rotary"):
        OptimConfig.parse([{"technique": NAME, "where": ["queries"]}])


def test_reordered_queries_would_change_a_model_with_rotary_positions():
    model = tiny_llama()
    inputs = inputs_for(model)
    before = logits(model, inputs)
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    with torch.no_grad():
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            weight = model.model.layers[0].self_attn.get_submodule(part).weight
            weight.copy_(weight.view(heads, 8, 32)[:, order].reshape(weight.shape))
    assert float((logits(model, inputs) - before).abs().max()) > 1e-3 * float(before.abs().max())


def test_masks_of_an_earlier_step_are_permuted():
    steps = [{"technique": "magnitude", "sparsity": 0.5}, {"technique": NAME, **QUICK}]
    pruned = hf_optim.optimize(tiny_llama(), steps[:1])
    model = hf_optim.optimize(tiny_llama(), steps)
    run = run_of(model)
    assert holds(SPARSE, run)
    assert SPARSE in run.traits
    assert any(not torch.equal(mask, run_of(pruned).masks[name]) for name, mask in run.masks.items())
    for name, mask in run.masks.items():
        assert int(mask.sum()) == int(run_of(pruned).masks[name].sum())
        assert torch.equal(mask, model.get_parameter(name) != 0)
    assert run.record.steps["1"]["kept_after"] > run.record.steps["1"]["kept_before"] > 0.74


def test_nm_masks_must_come_later():
    with pytest.raises(RecipeError, match=r"move channel_permutation before step 1.*keeps N of every M weights"):
        OptimConfig.parse([{"technique": "nm"}, {"technique": NAME}]).check()
    OptimConfig.parse([{"technique": NAME}, {"technique": "nm"}]).check()


def test_the_score_by_activations_uses_the_norms_of_the_inputs():
    data = [inputs_for(tiny_llama(), seed=seed) for seed in range(2)]
    fields = {"technique": NAME, "score": "activation", "where": ["neurons"], **QUICK}
    model = tiny_llama()
    dense, found = weights(model), []
    down = "model.layers.0.mlp.down_proj"
    handle = model.get_submodule(down).register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    for batch in data:
        logits(model, batch)
    handle.remove()
    model = hf_optim.optimize(model, fields, calibration=data)
    norm = torch.cat(found).norm(dim=0)
    figures, after = run_of(model).record.steps["0"], weights(model)
    score = dense[down].abs() * norm
    order = column_order(dense[down], after[down])
    assert torch.equal(after[down], dense[down][:, order])
    assert figures["kept_before_by_layer"][down] == pytest.approx(kept(score) / float(score.sum()), rel=1e-4)
    assert figures["kept_after_by_layer"][down] == pytest.approx(kept(score[:, order]) / float(score.sum()), rel=1e-4)
    assert figures["kept_after_by_layer"][down] > figures["kept_before_by_layer"][down]
    assert OptimConfig.parse([fields]).steps[0].needs_data()
    assert not OptimConfig.parse([{"technique": NAME}]).steps[0].needs_data()


def test_only_layers_that_will_be_sparse_count():
    model = tiny_llama()
    dense = weights(model)
    model = permuted(model, targets=["*.down_proj"], skip=["model.layers.1.*"])
    names, _ = run_of(model).covered(run_of(model).recipe.steps[0])
    assert names == {"model.layers.0.mlp.down_proj"}
    same = [name for name, weight in weights(model).items() if torch.equal(weight, dense[name])]
    assert set(dense) - set(same) == {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}


def test_an_order_that_is_not_better_is_not_used():
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(torch.tensor([2.0, 1.0, 0.0, 0.0]).repeat(32, 12))
    with torch.no_grad():
        start = {name: p.clone() for name, p in model.named_parameters()}
    model = permuted(model, where=["neurons"])
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    figures = run_of(model).record.steps["0"]
    assert (figures["orders_searched"], figures["orders_used"], figures["layers_permuted"]) == (2, 0, 0)
    assert figures["kept_before"] == figures["kept_after"] == 1.0


def test_widths_that_do_not_divide_are_listed():
    model = permuted(tiny_llama(intermediate_size=46))
    _, skipped = run_of(model).covered(run_of(model).recipe.steps[0])
    assert skipped["its 46 channels do not fill groups of 4"] == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}
    with pytest.raises(ModelError, match=r"step 1 \(channel_permutation\).*46 channels do not fill groups of 4"):
        permuted(tiny_llama(intermediate_size=46), where=["neurons"])


def test_a_returned_stream_stays_and_the_rest_is_permuted():
    with torch.random.fork_rng():
        model = BertModel(tiny_bert().config).eval()
    inputs = {"input_ids": torch.arange(3, 11)[None]}
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
    model = permuted(model)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).last_hidden_state, before, atol=1e-5)
    names, skipped = run_of(model).covered(run_of(model).recipe.steps[0])
    assert any("returns its residual stream" in reason for reason in skipped)
    assert any(name.endswith("output.dense") for name in names)
    with pytest.raises(ModelError, match=r"step 1 \(channel_permutation\).*returns its residual stream"):
        permuted(model, where=["residual"])


def test_fused_experts_have_no_neurons_to_permute():
    with pytest.raises(ModelError, match=r"step 1 \(channel_permutation\).*no channels of neurons"):
        permuted(tiny_mixtral(), where=["neurons"])


def test_a_permutation_that_changes_outputs_is_undone(monkeypatch):
    real = permutation_sites._residual_site

    def broken(model, residual):
        parameters = {name: dims for name, dims in residual.parameters.items() if "lm_head" not in name}
        object.__setattr__(residual, "parameters", parameters)
        return real(model, residual)

    monkeypatch.setattr(permutation_sites, "_residual_site", broken)
    model = tiny_llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NumericalError, match=r"step 1 \(channel_permutation\).*changes its outputs.*undone"):
        permuted(model)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 4}, "keep must be < group"),
        ({"stripes": 4}, "stripes must be <= 3"),
        ({"where": []}, "at least one of"),
        ({"score": "act"}, "one of 'magnitude', 'activation'"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": NAME, **fields}])


def test_the_card_has_the_result(tmp_path):
    model = permuted(tiny_llama())
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    figures = run_of(model).record.steps["0"]
    assert "The input channels of 14 linear layers were reordered for 2:4 pruning" in text
    assert f"keeps {100 * figures['kept_after']:.2f} % of their scores instead of " in text
    assert f"{100 * figures['kept_before']:.2f} %, which recovers" in text


@pytest.mark.real_model
def test_a_real_model_loses_less_by_pruning(shared_models, shared_data):
    from transformers import AutoModelForCausalLM

    folder = shared_models / "babyllama-1m"
    held_out = windows(folder, shared_data, "eval", 8)

    def perplexity(*steps):
        model = AutoModelForCausalLM.from_pretrained(folder, optim_config=[*steps, "nm"], dtype=torch.float32)
        return math.exp(mean_loss(model, held_out))

    assert perplexity({"technique": NAME, **QUICK}) < 0.9 * perplexity()
