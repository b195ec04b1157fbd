"""Top-KAST in a stock Trainer: exact supports, which weights change, its limits, resumption, and its effect."""

from __future__ import annotations

import pytest
import torch
from real_stories import Stories
from safetensors.torch import load_file
from tiny_models import tiny_gpt2, tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_optim
from hf_optim import ModelError, NumericalError, OptimConfig, RecipeError, run_of
from hf_optim.recipes.traits import SPARSE, SPARSE_NM
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.pruning import masked_layers, masks
from hf_optim.toolkit.topology.linear_layers import linears
from hf_optim_plugins.sparsity.top_kast import penalize_

RATE = 1e-2


def rows(count=32, width=12, alike=False):
    tokens = torch.randint(3, 64, (count, width), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in (tokens[:1].expand(count, -1) if alike else tokens)]


class Watch(TrainerCallback):
    """The weights and supports after every step."""

    def __init__(self):
        self.weights, self.used, self.reached, self.means = {}, {}, {}, {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        layers = masked_layers.masked_layers(model)
        now = state.global_step
        self.weights[now] = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        self.used[now] = {name: layer.forward_mask for name, layer in layers.items()}
        self.reached[now] = {name: layer.backward_mask for name, layer in layers.items()}
        means = {name: optimizer.state[layer.weight].get("exp_avg") for name, layer in layers.items()}
        self.means[now] = {name: mean.clone() for name, mean in means.items() if mean is not None}


def train(model, folder, steps=4, resume=None, data=None, plain=False, **more):
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    watch = Watch()
    own = [] if plain else [*hf_optim.callbacks(model), watch]
    arguments = TrainingArguments(**{**settings, **more})
    Trainer(model=model, args=arguments, train_dataset=data or rows(), callbacks=own).train(
        resume_from_checkpoint=resume
    )
    model.eval()
    return watch


def same(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the supports -----------------------------------------------------------------------------------------------------
def test_supports_are_exact_under_ties():
    """All weights of a layer are equal: the counts are exact, lower indices first, and A lies in B."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in linears(model).values():
            layer.weight.copy_(torch.where(torch.rand(layer.weight.shape) < 0.5, 0.5, -0.5))
    model = hf_optim.optimize(model, {"technique": "top_kast", "sparsity": 0.77, "backward_sparsity": 0.33})
    hf_optim.callbacks(model)
    layers = masked_layers.masked_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        size = layer.weight.numel()
        for mask, share in ((layer.forward_mask, 0.77), (layer.backward_mask, 0.33)):
            kept = size - masks.removed_count(size, share)
            assert torch.equal(mask.reshape(-1), torch.arange(size) < kept)


def reference(model, steps, optimizer, density, reach, every, strength, kind, clip):
    """The paper's algorithm, written out: dense weights here, a model with A of them there."""
    dense = dict(model.named_parameters())
    names = [f"{name}.weight" for name in linears(model) if name != "lm_head"]
    optimizer = optimizer(dense.values())
    batch = torch.stack([row["input_ids"] for row in rows(4, alike=True)])

    def top(parameter, share):
        order = parameter.detach().abs().reshape(-1).argsort(descending=True, stable=True)
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[order[: parameter.numel() - masks.removed_count(parameter.numel(), 1 - share)]] = True
        return mask.view_as(parameter)

    for step in range(steps):
        if step % every == 0:
            used = {name: top(dense[name], density) for name in names}
            reached = {name: top(dense[name], reach) for name in names}
        sparse = {n: (p.detach() * used.get(n, True)).requires_grad_() for n, p in dense.items()}
        torch.func.functional_call(model, sparse, (), {"input_ids": batch, "labels": batch}).loss.backward()
        for name, parameter in dense.items():
            parameter.grad = sparse[name].grad * reached.get(name, True)
        torch.nn.utils.clip_grad_norm_(dense.values(), clip)
        for name in names:
            theta = dense[name].detach().requires_grad_()
            size = theta.square() / 2 if kind == "l2" else theta.abs()
            penalty = (size * used[name]).sum() + (size * (reached[name] & ~used[name])).sum() / density
            dense[name].grad += torch.autograd.grad(strength * penalty, theta)[0]
        optimizer.step()
    return {name: dense[name].detach() for name in names}, used


@pytest.mark.many(every=4)
@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_training_is_the_papers_algorithm(build, kind, tmp_path):
    expected, used = reference(
        build().double().eval(), 5, lambda p: torch.optim.SGD(p, RATE), 0.3, 0.6, 2, 0.1, kind, clip=0.5
    )
    fields = {"sparsity": 0.7, "backward_sparsity": 0.4, "every": 2, "strength": 0.1, "penalty": kind}
    model = hf_optim.optimize(build().double(), {"technique": "top_kast", **fields})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    watch = train(model, tmp_path, 5, data=rows(alike=True), optim="sgd", max_grad_norm=0.5)
    for name, weight in expected.items():
        layer = name.removesuffix(".weight")
        assert torch.allclose(watch.weights[5][layer], weight, atol=1e-6), name
        assert torch.equal(watch.used[5][layer], used[name])
        assert torch.allclose(model.get_parameter(name), weight * used[name], atol=1e-6)


def test_the_penalty_of_explored_weights_is_scaled_by_one_over_d():
    layer = masked_layers.attach_masks(torch.nn.Linear(4, 1, bias=False).double())
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
    layer.set_masks(torch.tensor([[True, False, False, False]]), torch.tensor([[True, True, False, False]]))
    for kind, expected in (("l2", [0.4, -1.2, 0.0, 0.0]), ("l1", [0.1, -0.4, 0.0, 0.0])):
        layer.weight.grad = torch.zeros_like(layer.weight)
        penalize_([layer], 0.1, 0.25, kind)
        assert torch.allclose(layer.weight.grad, torch.tensor([expected], dtype=torch.float64))


# -- its limits -------------------------------------------------------------------------------------------------------
def test_a_density_of_one_is_dense_training(tmp_path):
    step = {"technique": "top_kast", "sparsity": 0.0, "backward_sparsity": 0.0, "strength": 0.0, "every": 2}
    model = hf_optim.optimize(tiny_llama(), step)
    train(model, tmp_path, weight_decay=0.1)
    plain = tiny_llama()
    train(plain, tmp_path, plain=True, weight_decay=0.1)
    assert same(model, plain)


def test_without_exploration_it_is_static(tmp_path):
    """M = 0 is training under the fixed mask of the first weights, whatever the rate."""
    step = {"technique": "top_kast", "sparsity": 0.8, "backward_sparsity": 0.8, "every": 1, "strength": 0.0}
    model = hf_optim.optimize(tiny_llama(), step)
    watch = train(model, tmp_path, 6, learning_rate=0.1, max_grad_norm=0.0)
    static = hf_optim.optimize(tiny_llama(), {"technique": "magnitude", "sparsity": 0.8})
    for name, mask in watch.used[6].items():
        assert mask is watch.used[1][name]
        assert torch.equal(mask, run_of(static).masks[f"{name}.weight"])
    # The norm that is clipped would differ: there it is of the gradient of all weights.
    train(static, tmp_path, 6, learning_rate=0.1, max_grad_norm=0.0)
    assert same(model, static)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_weights_outside_b_do_not_change_and_a_exchanges_weights(optim, tmp_path):
    step = {"technique": "top_kast", "sparsity": 0.7, "backward_sparsity": 0.4, "every": 2}
    model = hf_optim.optimize(tiny_llama(), step)
    watch = train(model, tmp_path, 8, learning_rate=0.05, weight_decay=0.5, optim=optim)
    exchanged = explored = 0
    for now in range(2, 9):
        for name, weight in watch.weights[now].items():
            reached, used = watch.reached[now - 1][name], watch.used[now - 1][name]
            moved = weight != watch.weights[now - 1][name]
            assert not (moved & ~reached).any()
            explored += int((moved & reached & ~used).sum())
            exchanged += int((watch.used[now][name] != used).sum())
            assert torch.equal(watch.reached[now][name] & watch.used[now][name], watch.used[now][name])
            if optim == "adamw_torch":
                assert not watch.means[now][name][~watch.reached[now][name]].any()
    assert explored > 0
    assert exchanged > 0


@pytest.mark.parametrize("end", [4, 0.5])
def test_exploration_ends(end, tmp_path):
    step = {"technique": "top_kast", "sparsity": 0.7, "backward_sparsity": 0.4, "every": 3, "end": end}
    model = hf_optim.optimize(tiny_llama(), step)
    watch = train(model, tmp_path, 8, learning_rate=0.05)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(watch.reached[3][name], watch.used[3][name])
    for now in range(4, 9):
        assert torch.equal(watch.reached[now][name], watch.used[4][name])
        assert torch.equal(watch.used[now][name], watch.used[4][name])
    size = watch.weights[4][name].numel()
    expected = masks.layer_masks({"w": watch.weights[4][name]}, 0.7)["w"]
    assert torch.equal(watch.used[4][name], expected)
    assert int(expected.sum()) == size - masks.removed_count(size, 0.7)
    assert torch.equal(run_of(model).masks[f"{name}.weight"], expected)
    assert holds(SPARSE, run_of(model))


# -- the lifecycle ----------------------------------------------------------------------------------------------------
@pytest.mark.many(every=4)
@pytest.mark.parametrize("fields", [{"every": 3}, {"every": 2, "end": 3}], ids=str)
def test_a_checkpoint_is_dense_and_training_resumes_bit_exact(fields, tmp_path):
    step = {"technique": "top_kast", "sparsity": 0.7, "backward_sparsity": 0.4, **fields}
    whole = hf_optim.optimize(tiny_gpt2(), step)
    train(whole, tmp_path, 8, save_strategy="steps", save_steps=4, learning_rate=0.05)
    saved = tmp_path / "checkpoint-4"
    assert bool(load_file(saved / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"].all())
    again = hf_optim.optimize(tiny_gpt2(seed=1), step)
    train(again, tmp_path, 8, resume=str(saved), learning_rate=0.05)
    assert same(whole, again)
    assert all(torch.equal(mask, run_of(again).masks[name]) for name, mask in run_of(whole).masks.items())


def test_weights_removed_by_an_earlier_step_stay_removed(tmp_path):
    steps = [{"technique": "nm"}, {"technique": "top_kast", "sparsity": 0.7, "backward_sparsity": 0.3, "every": 2}]
    model = hf_optim.optimize(tiny_llama(), steps)
    before = {name: mask.clone() for name, mask in run_of(model).masks.items()}
    train(model, tmp_path)
    run = run_of(model)
    for name, mask in run.masks.items():
        assert not (mask & ~before[name]).any()
        assert int((~mask).sum()) == masks.removed_count(mask.numel(), 0.7)
    assert {SPARSE, SPARSE_NM} <= run.traits
    assert all(holds(trait, run) for trait in run.traits)


def test_warnings_and_refusals(tmp_path, caplog):
    model = hf_optim.optimize(tiny_llama(), {"technique": "top_kast", "end": 9, "every": 1})
    train(model, tmp_path, 2)
    assert "exploration ends at step 9, but training at step 2" in caplog.text
    with pytest.raises(ModelError, match=r"step 1 \(top_kast\).*targets and skip"):
        hf_optim.optimize(tiny_llama(), {"technique": "top_kast", "targets": ["*.up_proj"], "skip": ["*.mlp.*"]})
    broken = tiny_llama()
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"up_proj\.weight: the weights of the model hold NaN"):
        hf_optim.callbacks(hf_optim.optimize(broken, {"technique": "top_kast"}))
    for fields, message in (
        ({"sparsity": 0.5, "backward_sparsity": 0.6}, "backward_sparsity must be <= sparsity"),
        ({"end": 1.5}, "share of training"),
        ({"penalty": "l3"}, "penalty"),
        ({"sparsity": 1.0}, "must be < 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            OptimConfig.parse([{"technique": "top_kast", **fields}])


@pytest.mark.real_model
def test_exploring_is_better_than_static_sparsity_at_equal_steps(tmp_path, shared_models, shared_data):
    stories = Stories(shared_models, shared_data)

    def loss_after(**fields):
        step = {"technique": "top_kast", "sparsity": 0.8, **fields}
        loss = stories.loss_after(step, tmp_path, 240, lr_scheduler_type="linear", seed=42)
        assert stories.sparsity == pytest.approx(0.8, abs=1e-3)
        return loss

    static, explored = loss_after(backward_sparsity=0.8), loss_after(backward_sparsity=0.5, end=0.75)
    assert explored < static - 0.1
