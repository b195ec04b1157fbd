"""L0 regularization in OptimTrainer: gates folded into weights, units closed whole, its price, exact resumption."""

from __future__ import annotations

import re

import pytest
import torch
from real_stories import Stories
from safetensors.torch import load_file
from test_variational_dropout import IDS, same
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from toy_training import arguments, sentences
from transformers import TrainerCallback

from hf_optim import ModelError, OptimTrainer, RecipeError, optimize, run_of
from hf_optim.recipes.traits import SPARSE, SPARSE_NM
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules.modes import eval_mode
from hf_optim.toolkit.pruning import hard_concrete, masks
from hf_optim.toolkit.pruning.noisy_layers import NoisyLayer
from hf_optim.toolkit.topology.linear_layers import weight_out_in
from hf_optim.toolkit.topology.prunable_groups import find_prunable_groups
from hf_optim_plugins.pruning.l0 import open_share

# Gates that move fast: some close within a handful of steps.
QUICK = {"technique": "l0", "initial": 0.2, "gate_learning_rate": 0.5, "end": 0, "weight": 1.0}


class Watch(TrainerCallback):
    """Logits in evaluation mode, weights and gates after every optimizer step, before the end of that step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with eval_mode(model):
            self.logits = model(IDS).logits
        layers = {n: m for n, m in model.named_modules() if isinstance(m, NoisyLayer)}
        self.alphas = {name: layer.log_alpha.detach().clone() for name, layer in layers.items()}
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model, folder, steps=5, resume=None, data=None, **more):
    watch = Watch()
    args = arguments(folder, max_steps=steps, **more)
    trainer = OptimTrainer(model=model, args=args, train_dataset=data or sentences(), callbacks=[watch])
    trainer.train(resume_from_checkpoint=resume)
    watch.log = trainer.state.log_history
    model.eval()
    return watch


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_gates_of_weights_are_folded_by_the_formula_of_test_time(build, tmp_path):
    model = optimize(build(), QUICK)
    run = run_of(model)
    watch = train(model, tmp_path)
    for name, alpha in watch.alphas.items():
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal(weight, watch.weights[f"{name}.weight"] * hard_concrete.deterministic_gates(alpha))
        assert torch.equal(run.masks[f"{name}.weight"], alpha > hard_concrete.CLOSED_LOG_ALPHA)
    assert 0.02 < run.record.steps["0"]["sparsity"] < 0.98
    assert holds(SPARSE, run)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, watch.logits, rtol=0, atol=1e-5)
    assert not any(isinstance(module, NoisyLayer) for module in model.modules())
    assert set(vars(run.state(run.recipe.steps[0]))) <= {"settled", "ramp", "closed"}


@pytest.mark.many(every=4)
@pytest.mark.parametrize("on", ["neurons", "heads"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_closed_units_are_zero_in_their_producers_and_consumers(build, on, tmp_path):
    model = optimize(build(), {**QUICK, "on": on, "initial": 0.5, "sparsity": 0.5})
    run = run_of(model)
    watch = train(model, tmp_path)
    units = {one.consumer: one for one in find_prunable_groups(topology.trace(build())) if one.kind == on}
    assert units.keys() == watch.alphas.keys()
    middle = torch.cat(list(watch.alphas.values())).median()
    closed = {name: alpha <= middle for name, alpha in watch.alphas.items()}
    assert 0 < sum(int(c.sum()) for c in closed.values()) < sum(c.numel() for c in closed.values())
    for name, gone in closed.items():
        columns = units[name].columns
        weight = weight_out_in(model.get_submodule(name))
        assert not weight[:, columns[gone].flatten()].any()
        before = watch.weights[f"{name}.weight"]
        before = before if build is tiny_llama else before.T
        for unit in (~gone).nonzero().flatten().tolist():
            gate = hard_concrete.deterministic_gates(watch.alphas[name])[unit]
            assert torch.equal(weight[:, columns[unit]], before[:, columns[unit]] * gate)
        for parameter, (dim, index) in units[name].entries.items():
            if parameter.endswith(".weight"):
                assert not model.get_parameter(parameter).index_select(dim, index[gone].flatten()).any()
    assert holds(SPARSE, run)


def test_other_parameters_of_a_unit_have_no_gate():
    """A head of T5 has a bias on attention scores that other layers also read."""
    model = tiny_t5()
    run = run_of(optimize(model, {**QUICK, "on": "heads"}))
    step = run.recipe.steps[0]
    step.prepare(run)
    parameters = {name for gates in run.state(step).noises.values() for name in gates.entries}
    assert any(name.endswith("SelfAttention.q.weight") for name in parameters)
    assert not any("relative_attention_bias" in name for name in parameters)


def test_the_price_is_the_expected_share_of_open_gates(tmp_path):
    step = {"technique": "l0", "weight": 3.0, "initial": 0.9, "begin": 0, "end": 2, "gate_learning_rate": 0.0}
    watch = train(optimize(tiny_llama(), step), tmp_path, 3, logging_steps=1, logging_strategy="steps")
    terms = [entry["l0"] for entry in watch.log if "l0" in entry]
    start = torch.tensor(hard_concrete.initial_log_alpha(0.9))
    price = 3.0 * hard_concrete.open_probability(start).item()
    assert terms == pytest.approx([0.0, price / 2, price], rel=1e-4)


@pytest.mark.parametrize("on", ["weights", "neurons"])
def test_a_gate_has_the_price_of_the_weights_under_it(on):
    """Of units and layers of unequal size: what an earlier step removed costs nothing."""
    model = tiny_llama()
    pruned = torch.ones(32, 48, dtype=torch.bool)
    pruned[:24, :40] = False
    run = run_of(optimize(model, {**QUICK, "on": on}))
    run.masks["model.layers.0.mlp.down_proj.weight"] = pruned
    step = run.recipe.steps[0]
    step.prepare(run)
    gates = run.state(step).noises
    expected, every = 0.0, 0
    for number, (name, each) in enumerate(sorted(gates.items())):
        drawn = torch.randn(each.log_alpha.shape, generator=torch.Generator().manual_seed(number))
        each.log_alpha.data.copy_(2 * drawn + 4 * (number % 2) - 2)
        opened = hard_concrete.open_probability(each.log_alpha.detach())
        mask = run.masks.get(f"{name}.weight")
        if on == "weights":
            sizes = torch.ones_like(opened) if mask is None else mask.float()
        else:
            # A row of gate and up of 32 weights each, and a column of down.
            sizes = torch.full((48,), 96.0) if mask is None else 64.0 + mask.sum(0)
        expected, every = expected + float((sizes * opened).sum()), every + int(sizes.sum())
    share = open_share(list(gates.values()), run.masks)
    assert share.item() == pytest.approx(expected / every, rel=1e-5)
    layers = [hard_concrete.open_probability(each.log_alpha.detach()).mean() for each in gates.values()]
    assert abs(share.item() - torch.stack(layers).mean().item()) > 0.005


def test_the_multipliers_rise_by_gradient_ascent(tmp_path):
    """Constant gates miss the target by m: after k steps λ₁ = k r m and λ₂ = k r m²."""
    step = {**QUICK, "sparsity": 0.5, "initial": 0.9, "multiplier_rate": 2.0, "gate_learning_rate": 0.0}
    watch = train(optimize(tiny_llama(), step), tmp_path, 4, logging_steps=1, logging_strategy="steps")
    terms = [entry["l0"] for entry in watch.log if "l0" in entry]
    missing = 0.5 - (1 - hard_concrete.open_probability(torch.tensor(hard_concrete.initial_log_alpha(0.9))).item())
    assert terms == pytest.approx([k * 2.0 * (missing**2 + missing**4) for k in range(4)], rel=1e-4)


@pytest.mark.slow
def test_a_target_sparsity_is_reached_by_rising_prices(tmp_path):
    """Neurons, of which 94 % are expected to be open at first and half in the end."""
    step = {**QUICK, "on": "neurons", "sparsity": 0.5, "initial": 0.9, "multiplier_rate": 0.1, "end": 0.5}
    model = optimize(tiny_llama(), {**step, "gate_learning_rate": 0.05})
    watch = train(model, tmp_path, 150, lr_scheduler_type="constant", logging_strategy="steps", logging_steps=10)
    terms = [entry["l0"] for entry in watch.log if "l0" in entry]
    assert terms[-1] < max(terms)
    opened = torch.cat([hard_concrete.open_probability(alpha) for alpha in watch.alphas.values()])
    assert opened.mean().item() == pytest.approx(0.5, abs=0.15)
    assert run_of(model).record.steps["0"]["closed"] >= 0.5


def test_a_target_closes_the_gates_of_the_smallest_log_alpha(tmp_path):
    model = optimize(tiny_llama(), {**QUICK, "sparsity": 0.6, "initial": 0.9})
    watch = train(model, tmp_path)
    run = run_of(model)
    flat = torch.cat([alpha.flatten() for alpha in watch.alphas.values()])
    kept = torch.cat([run.masks[f"{name}.weight"].flatten() for name in watch.alphas])
    assert int((~kept).sum()) == masks.removed_count(kept.numel(), 0.6)
    assert flat[kept].min() >= flat[~kept].max()


@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    "fields", [{}, {"sparsity": 0.5, "multiplier_rate": 2.0}, {"on": "heads", "sparsity": 0.5, "settle": 4}], ids=str
)
def test_a_checkpoint_is_ordinary_and_training_resumes_bit_exact(fields, tmp_path):
    step, more = {**QUICK, **fields}, {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    whole = optimize(tiny_llama(), step)
    train(whole, tmp_path, 6, weight_decay=0.1, **more)
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors").keys() == tiny_llama().state_dict().keys()
    for at in (3, 5):
        again = optimize(tiny_llama(seed=1), step)
        train(again, tmp_path / "again", 6, resume=str(tmp_path / f"checkpoint-{at}"), weight_decay=0.1, **more)
        assert same(whole, again)
        assert all(torch.equal(mask, run_of(again).masks[name]) for name, mask in run_of(whole).masks.items())


@pytest.mark.parametrize("on", ["weights", "neurons"])
def test_weights_removed_by_an_earlier_step_stay_removed(on, tmp_path):
    model = optimize(tiny_gpt2(), [{"technique": "nm"}, {**QUICK, "on": on, "initial": 0.12}])
    run = run_of(model)
    before = {name: mask.clone() for name, mask in run.masks.items()}
    train(model, tmp_path)
    assert holds(SPARSE_NM, run)
    assert all(not (run.masks[name] & ~mask).any() for name, mask in before.items())
    assert any((mask & ~run.masks[name]).any() for name, mask in before.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"begin": 9, "end": 3}, "begin must be <= end"),
        ({"end": 1.0, "settle": 0.2}, r"l0: end must be <= settle, not 1\.0 > 0\.2"),
        ({"end": 5, "settle": 4}, "end must be <= settle, not 5 > 4"),
        ({"settle": 1.5}, r"settle is a share of training in \[0, 1\] or a whole number"),
        ({"on": "layers"}, "on must be"),
        ({"initial": 1.0}, "initial must be < 1"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        optimize(tiny_llama(), {"technique": "l0", **fields})


@pytest.mark.parametrize(
    ("fields", "cut", "outcome"),
    [
        ({"end": 1000}, "training at step 10", r"the price reaches 0\.01 instead of 1; train longer, or lower end"),
        ({"begin": 500, "end": 1000}, "training at step 10", "the price reaches 0 instead of 1"),
        ({"end": 20, "sparsity": 0.6}, "training at step 10", r"reaches a sparsity of 0\.3000 instead of 0\.6, and"),
        ({"end": 8, "settle": 0.4}, "weights are removed for good at step 4", r"0\.5 instead of 1; raise settle, or"),
    ],
)
def test_an_unfinished_ramp_warns_at_the_start(tmp_path, caplog, fields, cut, outcome):
    model = optimize(tiny_llama(), {"technique": "l0", **fields})
    message = rf"step 1 \(l0\): the schedule ends at step {fields['end']}, but {cut}: .*{outcome}"
    train(model, tmp_path, 10)
    assert re.search(message, caplog.text)
    assert any("the schedule ends at step" in note for note in run_of(model).record.notes)


def test_a_finished_ramp_does_not_warn(tmp_path):
    model = optimize(tiny_llama(), {"technique": "l0", "end": 4, "settle": 4})
    train(model, tmp_path, 4)
    assert run_of(model).record.notes == []


def test_a_ramp_that_ends_before_it_begins_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"step 1 \(l0\): the schedule begins at step 500 and ends at step 5 of 10"):
        train(optimize(tiny_llama(), {"technique": "l0", "begin": 500, "end": 0.5}), tmp_path, 10)


def test_gates_are_sampled_from_the_first_training_forward_on():
    model = optimize(tiny_llama(), {"technique": "l0"})
    run = run_of(model)
    run.recipe.steps[0].prepare(run)
    gates = run.state(run.recipe.steps[0]).noises.values()
    for mode, expected in (("eval", False), ("train", True), ("eval", True)):
        getattr(model, mode)()(torch.ones(1, 4, dtype=torch.long))
        assert {one.sampled for one in gates} == {expected}


def test_a_model_without_such_units_is_refused():
    with pytest.raises(ModelError, match=r"step 1 \(l0\): MixtralForCausalLM has no neurons"):
        optimize(tiny_mixtral(), {**QUICK, "on": "neurons"})


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.smoke
def test_a_fifth_of_the_neurons_of_a_real_model_closes(tmp_path, shared_models, shared_data):
    """The loss is below that of closing as many at random; so few steps do not reach the dense loss."""
    stories = Stories(shared_models, shared_data, width=64, held_out=96)
    step = {"technique": "l0", "on": "neurons", "sparsity": 0.2, "gate_learning_rate": 0.1, "multiplier_rate": 1.0}
    model = stories.load([{**step, "initial": 0.95, "end": 0.3, "settle": 0.8}])
    train(model, tmp_path, 120, data=stories.rows, learning_rate=1e-3, per_device_train_batch_size=8)
    closed = run_of(model).record.steps["0"]["closed"]
    by_chance = stories.load()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in by_chance.model.layers:
            width = layer.mlp.down_proj.in_features
            layer.mlp.down_proj.weight[:, torch.randperm(width, generator=generator)[: round(closed * width)]] = 0.0
    chance, found = stories.loss(by_chance), stories.loss(model)
    assert closed >= 0.199
    assert found < chance - 0.1, (chance, found)
