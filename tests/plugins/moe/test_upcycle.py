"""Sparse upcycling: the same function in a native mixture-of-experts class, which then learns faster."""

from __future__ import annotations

import textwrap

import pytest
import torch
from real_stories import windows
from tiny_models import DECODER, TINY, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_t5
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError
from hf_optim.lifecycle.stages import start_run
from hf_optim.recipes.traits import BITS_ASSIGNED
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit import compat, topology
from hf_optim_plugins.moe.upcycle import BalanceExperts, Upcycle

IDS = torch.arange(3, 27).reshape(2, 12)


def upcycle(model, before=None, **fields):
    """Call the hook directly; ``before(run)`` prepares the run."""
    recipe = OptimConfig.parse([Upcycle(**fields)])
    run = start_run(recipe, model.config)
    run.model = model
    if before is not None:
        before(run)
    run.model = recipe.steps[0].transform_model(run)
    return run


def logits(model, ids=IDS):
    # The fused expert kernels know no float64.
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(input_ids=ids).logits


def built(cls, config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(config).eval()


def tiny_qwen3():
    return built(Qwen3ForCausalLM, Qwen3Config(**{**DECODER, "head_dim": 16}))


def tiny_mistral(**changes):
    return built(MistralForCausalLM, MistralConfig(**{**DECODER, "sliding_window": 4, **changes}))


@pytest.mark.parametrize(
    ("build", "target"),
    [
        (tiny_llama, MixtralForCausalLM),
        (lambda: tiny_llama(tie_word_embeddings=True, head_dim=16), MixtralForCausalLM),
        (
            lambda: tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
            MixtralForCausalLM,
        ),
        (tiny_mistral, MixtralForCausalLM),
        (tiny_qwen2, Qwen2MoeForCausalLM),
        (tiny_qwen3, Qwen3MoeForCausalLM),
    ],
    ids=["llama", "llama-tied-wide-heads", "llama-scaled-rope", "mistral-window", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_renormalised_top_k_is_the_dense_model(build, target, top_k):
    dense = build().double()
    run = upcycle(dense, experts=4, top_k=top_k)
    assert type(run.model) is target
    assert topology.has_experts(run.model)
    # Some routers work in float32.
    assert torch.allclose(logits(run.model), logits(dense), rtol=0, atol=1e-6)


def test_experts_run_as_those_of_stock_transformers():
    for dtype, name in ((torch.float32, "grouped_mm"), (torch.float64, "eager")):
        model = hf_optim.optimize(tiny_llama().to(dtype), [{"technique": "upcycle", "experts": 4}])
        assert model.config._experts_implementation == name


def test_a_window_survives():
    run = upcycle(tiny_mistral())
    assert run.model.config.sliding_window == 4
    assert run.model(IDS, use_cache=True)[compat.CACHE].layers[0].is_sliding


@pytest.mark.parametrize("build", [tiny_qwen2, tiny_qwen3])
@pytest.mark.parametrize("fields", [{"every": 2}, {"dense_layers": [0]}])
def test_every_second_layer(build, fields):
    dense = build()
    run = upcycle(dense, experts=4, **fields)
    kinds = [hasattr(layer.mlp, "experts") for layer in run.model.model.layers]
    assert kinds == [False, True]
    assert run.record.steps["0"]["layers"] == 1
    assert torch.allclose(logits(run.model), logits(dense), atol=1e-5)


def test_the_other_weights_are_shared_and_the_experts_are_copies():
    dense = tiny_llama()
    model = upcycle(dense, experts=3).model
    ours, theirs = model.model.layers[0], dense.model.layers[0]
    assert ours.self_attn.q_proj.weight is theirs.self_attn.q_proj.weight
    assert model.lm_head.weight is dense.lm_head.weight
    assert ours.mlp.experts.gate_up_proj.shape == (3, 96, 32)
    for expert in range(3):
        assert torch.equal(ours.mlp.experts.gate_up_proj[expert, :48], theirs.mlp.gate_proj.weight)
        assert torch.equal(ours.mlp.experts.gate_up_proj[expert, 48:], theirs.mlp.up_proj.weight)
        assert torch.equal(ours.mlp.experts.down_proj[expert], theirs.mlp.down_proj.weight)


def test_tied_embeddings_stay_tied():
    model = upcycle(tiny_llama(tie_word_embeddings=True)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_head():
    dense = built(LlamaForSequenceClassification, tiny_llama().config)
    model = upcycle(dense).model
    assert type(model) is MixtralForSequenceClassification
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)


def test_router_is_drawn_from_the_seed_and_leaves_the_global_state():
    state = torch.get_rng_state()
    one, two, other = (upcycle(tiny_llama(), seed=seed, router_std=0.5).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    routers = [model.model.layers[0].mlp.gate.weight for model in (one, two, other)]
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert 0.4 < routers[0].std().item() < 0.6


def test_a_shared_expert_adds_zero_and_can_learn():
    model = upcycle(tiny_qwen2(), experts=2, shared_width=16).model.train()
    shared = model.model.layers[0].mlp.shared_expert
    assert shared.gate_proj.weight.shape == (16, 32)
    assert 0.01 < shared.up_proj.weight.std().item() < 0.03
    assert not shared.down_proj.weight.any()
    assert not model.model.layers[0].mlp.shared_expert_gate.weight.any()
    model.config._experts_implementation = "eager"
    model(IDS, labels=IDS).loss.backward()
    assert shared.down_proj.weight.grad.any()


def test_routers_without_values_and_with_jitter():
    model = upcycle(tiny_llama(), experts=4, router_std=0.0, router_jitter=0.3).model
    assert model.config.router_jitter_noise == 0.3
    assert not any(layer.mlp.gate.weight.any() for layer in model.model.layers)
    assert torch.allclose(logits(model), logits(tiny_llama()), atol=1e-5)  # in evaluation there is none
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_noise_makes_experts_differ_and_keeps_zeros():
    dense = tiny_llama()
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    model = upcycle(dense, noise=0.1).model
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert not torch.equal(experts[0], experts[1])
    assert not experts[:, 48:, ::2].any()
    relative = (experts[0] - experts[1]).std() / dense.model.layers[0].mlp.gate_proj.weight.std()
    assert 0.05 < relative.item() < 0.3


def test_masks_move_to_the_experts():
    dense = tiny_llama()
    names = {leaf: f"model.layers.0.mlp.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")}
    masks = {leaf: torch.rand_like(dense.get_parameter(name)) > 0.5 for leaf, name in names.items()}

    def prepare(run):
        run.masks.update({names[leaf]: mask for leaf, mask in masks.items()})
        run.nm_patterns.update(dict.fromkeys(names.values(), (2, 4)))

    run = upcycle(dense, before=prepare, experts=2)
    mixture = "model.layers.0.mlp.experts."
    assert set(run.masks) == set(run.nm_patterns) == {mixture + "gate_up_proj", mixture + "down_proj"}
    assert torch.equal(run.masks[mixture + "gate_up_proj"][1], torch.cat([masks["gate_proj"], masks["up_proj"]]))
    assert all(mask.shape == run.model.get_parameter(name).shape for name, mask in run.masks.items())
    assert run.nm_patterns[mixture + "down_proj"] == (2, 4)


@pytest.mark.parametrize("technique", ["magnitude", "nm"])
def test_a_pruned_model_gives_experts_that_its_card_counts(technique, tmp_path):
    model = hf_optim.optimize(tiny_llama(), [{"technique": technique}, {"technique": "upcycle", "experts": 3}])
    run = hf_optim.run_of(model)
    names = run.covered(run.recipe.steps[0])[0]
    assert "model.layers.1.mlp.experts.2.gate_up_proj" in names
    assert not any(name.endswith(("mlp.gate_proj", "mlp.down_proj")) for name in names)
    assert all(holds(trait, run) for trait in run.traits)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| model.layers.*.mlp.experts.*.down_proj | 6 | 9,216 | 50.0 % |" in card
    assert "| model.layers.*.self_attn.q_proj | 2 | 2,048 | 50.0 % |" in card
    again = type(model).from_pretrained(tmp_path)
    for name, mask in run.masks.items():
        assert not again.get_parameter(name)[~mask].any()


def test_assigned_bits_apply_to_every_expert():
    def prepare(run):
        run.bit_plan = {"model.layers.0.mlp.down_proj": 3, "model.layers.0.self_attn.q_proj": 4}

    run = upcycle(tiny_llama(), before=prepare, experts=2)
    experts = {f"model.layers.0.mlp.experts.{index}.down_proj": 3 for index in range(2)}
    assert run.bit_plan == {**experts, "model.layers.0.self_attn.q_proj": 4}
    assert holds(BITS_ASSIGNED, run)


def test_routers_get_their_own_learning_rate():
    run = upcycle(tiny_llama(), router_lr=0.5)
    (group,) = run.call("parameter_groups", model=run.model)[0]
    assert group["lr"] == 0.5
    assert [id(p) for p in group["params"]] == [id(layer.mlp.gate.weight) for layer in run.model.model.layers]
    assert not run.recipe.steps[0].__class__().parameter_groups(run, run.model)


def test_the_balancing_loss_is_on_while_training_only():
    run = upcycle(tiny_llama(), aux_loss=0.25)
    config = run.model.config
    (callback,) = run.recipe.steps[0].training_callbacks(run)
    assert isinstance(callback, BalanceExperts)
    assert config.router_aux_loss_coef == 0.25
    quiet = run.model(IDS, labels=IDS).loss
    callback.on_train_begin(None, None, None, model=run.model)
    outputs = run.model(IDS, labels=IDS)
    assert torch.allclose(outputs.loss, quiet + 0.25 * outputs.aux_loss)
    callback.on_train_end(None, None, None, model=run.model)
    assert run.model(IDS, labels=IDS).loss == quiet
    assert upcycle(tiny_llama(), aux_loss=0.0).recipe.steps[0].training_callbacks(run) == []


def test_parameters_are_counted():
    run = upcycle(tiny_llama(), experts=8, top_k=2)
    numbers = run.record.steps["0"]
    ffn = 2 * 3 * 48 * 32
    routers = 2 * 8 * 32
    assert numbers["parameters_after"] - numbers["parameters_before"] == 7 * ffn + routers
    assert numbers["active_parameters"] - numbers["parameters_before"] == ffn + routers


@pytest.mark.parametrize(
    ("build", "fields", "reason"),
    [
        (tiny_gpt2, {}, "supported: llama, mistral, qwen2, qwen3"),
        (tiny_t5, {}, "supported"),
        (TINY["bert"], {}, "supported"),
        (TINY["vit"], {}, "supported"),
        (lambda: tiny_llama(attention_bias=True), {}, r"no place for .*k_proj\.bias"),
        (lambda: tiny_llama(mlp_bias=True), {}, r"no place for .*down_proj\.bias"),
        (tiny_llama, {"every": 2}, "every=2 cannot be expressed for llama"),
        (
            tiny_llama,
            {"dense_layers": [0]},
            r"dense_layers=\[0\] cannot be expressed for llama .it can for qwen2, qwen3",
        ),
        (tiny_qwen2, {"router_jitter": 0.1}, "routers of qwen2_moe have no noise"),
        (tiny_qwen3, {"dense_layers": [2]}, "dense_layers has 2, but the last of the 2 layers is 1"),
        (tiny_qwen3, {"dense_layers": [0, 1]}, "select none of the 2 layers"),
        (tiny_qwen3, {"every": 3}, "select none of the 2 layers"),
    ],
)
def test_refusals(build, fields, reason):
    with pytest.raises(ModelError, match=rf"step 1 \(upcycle\): .*{reason}"):
        upcycle(build(), **fields)


def test_a_difference_in_function_is_refused(monkeypatch):
    step = Upcycle()
    dense = tiny_llama()
    run = upcycle(dense)
    with torch.no_grad():
        run.model.model.layers[0].mlp.experts.down_proj.mul_(1.01)
    with pytest.raises(ModelError, match="does not compute what LlamaForCausalLM computes"):
        step._verify(dense, run.model, "step 1 (upcycle)")


def test_fields_are_checked():
    with pytest.raises(RecipeError, match=r"top_k \(4\) cannot exceed experts \(2\)"):
        Upcycle(experts=2, top_k=4)
    with pytest.raises(RecipeError, match="dense_layers are numbers from 0"):
        Upcycle(dense_layers=(-1,))
    with pytest.raises(RecipeError, match="router_jitter"):
        Upcycle(router_jitter=1.0)
    with pytest.raises(RecipeError, match="router_lr"):
        Upcycle(router_lr=0.0)


def test_it_reloads_in_stock_transformers(tmp_path, stock_python):
    model = upcycle(tiny_llama(tie_word_embeddings=True, head_dim=16)).model
    model.save_pretrained(tmp_path)
    code = textwrap.dedent(f"""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
        with torch.no_grad():
            logits = model(torch.arange(3, 27).reshape(2, 12)).logits
        torch.save(logits, {str(tmp_path / "logits.pt")!r})
        print(type(model).__module__, type(model).__name__)
    """)
    done = stock_python.copy(code)
    assert done.status == 0, done.err
    assert done.out.split() == ["transformers.models.mixtral.modeling_mixtral", "MixtralForCausalLM"]
    with torch.no_grad():
        expected = model(IDS).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def _loss(model, windows):
    model.eval()
    with torch.no_grad():
        return float(torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in windows]).mean())


def _train(model, windows, steps, lr):
    """A few steps of AdamW on the same batches for every model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (8,), generator=order)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.smoke
def test_it_fits_a_little_data_better_than_the_dense_model(shared_models, shared_data):
    # What a CPU can show: the loss on the windows that both were trained on, with one seed and four experts. The longer
    # comparison, with what it loses on held-out data, is in model_cards/measurements.
    home = shared_models / "babyllama-1m"
    ids = windows(home, shared_data, "train", 16, 64)
    dense = AutoModelForCausalLM.from_pretrained(home)
    sparse = upcycle(AutoModelForCausalLM.from_pretrained(home), experts=4).model
    assert _loss(sparse, ids) == pytest.approx(_loss(dense, ids), rel=1e-5)
    for model in (dense, sparse):
        _train(model, ids, steps=20, lr=1e-3)
    assert _loss(sparse, ids) < _loss(dense, ids) - 0.01
