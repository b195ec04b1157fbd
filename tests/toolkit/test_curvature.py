"""Curvature: Hessian-vector products and power iteration against full Hessians in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5, tiny_vit
from torch import nn
from transformers import BertModel

from hf_optim.toolkit.statistics import (
    RecordedBatches,
    calibration_loss,
    enable_double_backward,
    gradients,
    hessian_product,
    power_iteration,
    random_direction,
    sample_microbatches,
)

DOUBLE = torch.float64


def small_net(seed: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 4)).double()
        return net, torch.randn(30, 5, dtype=DOUBLE), torch.randint(0, 4, (30,))


def dense_hessian(net: nn.Module, name: str, loss) -> torch.Tensor:
    """The Hessian of ``loss(outputs)`` in one weight, the full matrix ``[n, n]``."""
    weight = net.get_parameter(name).detach()
    whole = torch.func.jacrev(
        torch.func.grad(lambda w: loss(lambda x: torch.func.functional_call(net, {name: w}, (x,))))
    )(weight)
    return whole.detach().reshape(weight.numel(), weight.numel())


@pytest.mark.parametrize("seed", range(3))
def test_power_iteration_equals_the_eigenvalues_of_the_full_hessian(seed):
    net, x, y = small_net(seed)
    weights = {f"{i}.weight": net[i].weight for i in (0, 2, 4)}
    with enable_double_backward(net, weights.values()):
        found = gradients(nn.functional.cross_entropy(net(x), y), weights)
        assert found.keys() == weights.keys()
        for name, gradient in found.items():
            weight = weights[name]
            top = power_iteration(
                lambda v, g=gradient, w=weight: hessian_product(g, w, v), random_direction(weight), 4000, 1e-9
            )
            full = dense_hessian(net, name, lambda call: nn.functional.cross_entropy(call(x), y))
            values = torch.linalg.eigvalsh(full)
            assert top.converged
            assert top.value == pytest.approx(float(values[values.abs().argmax()]), rel=1e-3)
            vector = torch.randn_like(weight)
            expected = (full @ vector.flatten()).view_as(vector)
            assert torch.allclose(hessian_product(gradient, weight, vector), expected, rtol=1e-9, atol=1e-12)


def test_the_sign_of_a_negative_top_eigenvalue_is_kept():
    matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0], dtype=DOUBLE))
    top = power_iteration(lambda v: matrix @ v, torch.ones(3, dtype=DOUBLE), 200, 1e-10)
    assert top.value == pytest.approx(-3.0)
    assert abs(float(top.vector[1])) == pytest.approx(1.0)


def test_a_loss_that_is_linear_in_the_weight_has_no_curvature():
    layer = nn.Linear(4, 1, bias=False)
    x = torch.randn(8, 4)
    with enable_double_backward(layer, [layer.weight]):
        gradient = gradients(layer(x).sum(), {"w": layer.weight})["w"]
        top = power_iteration(lambda v: hessian_product(gradient, layer.weight, v), torch.ones(1, 4))
    assert top.value == 0.0
    assert top.converged


def test_weights_without_influence_are_left_out():
    used, idle = nn.Linear(3, 3), nn.Linear(3, 3)
    net = nn.ModuleList([used, idle])
    with enable_double_backward(net, [used.weight, idle.weight]):
        loss = used(torch.randn(2, 3)).square().sum()
        assert list(gradients(loss, {"used": used.weight, "idle": idle.weight})) == ["used"]
        assert gradients(torch.zeros(()), {"used": used.weight}) == {}


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert, tiny_vit, tiny_t5], ids=lambda b: b.__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_are_differentiated_twice(build, attention):
    """The product equals a central difference of gradients."""
    # A central difference needs a smooth function: T5 with GELU, since it would step over kinks of the ReLU.
    model = build(**({"feed_forward_proj": "gelu"} if build is tiny_t5 else {})).double()
    model.set_attn_implementation(attention)
    batch = inputs(model)
    name, weight = next(
        (n, p) for n, p in model.named_parameters() if n.endswith(("v_proj.weight", "value.weight", "v.weight"))
    )
    vector = random_direction(weight, seed=3)
    with enable_double_backward(model, [weight]):
        product = hessian_product(gradients(calibration_loss(model, batch), {name: weight})[name], weight, vector)
        if hasattr(model, "lm_head") and "decoder_input_ids" not in batch:
            loss = lambda: calibration_loss(model, batch)  # noqa: E731
        else:
            # The divergence is measured from the outputs of the unchanged model.
            fixed = model(**batch).logits.detach().log_softmax(-1)
            loss = lambda: nn.functional.kl_div(  # noqa: E731
                model(**batch).logits.log_softmax(-1).flatten(0, -2),
                fixed.flatten(0, -2),
                log_target=True,
                reduction="batchmean",
            )
        sides = []
        for step in (2e-4, -2e-4):
            with torch.no_grad():
                weight.add_(step * vector)
            sides.append(torch.autograd.grad(loss(), weight)[0])
            with torch.no_grad():
                weight.sub_(step * vector)
    assert torch.allclose(product, (sides[0] - sides[1]) / 4e-4, rtol=1e-4, atol=1e-4 * float(product.abs().max()))


def inputs(model) -> dict[str, torch.Tensor]:
    from hf_optim.testing.tiny_runs import inputs_for

    return {k: v.double() if v.is_floating_point() else v for k, v in inputs_for(model).items()}


def test_without_labels_the_hessian_is_the_gauss_newton_matrix():
    """½‖f - f₀‖² of a bare encoder, against JᵀJ with the Jacobian formed by autograd."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(tiny_bert(hidden_size=8, intermediate_size=8, num_attention_heads=2).config).double().eval()
    batch = {"input_ids": torch.randint(0, 60, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    batch["attention_mask"][1, 3:] = 0
    name = "encoder.layer.0.attention.self.value.weight"
    weight = model.get_parameter(name)

    def outputs(w):
        out = torch.func.functional_call(model, {name: w}, (), batch).last_hidden_state
        return (out * batch["attention_mask"].unsqueeze(-1)).flatten()

    with enable_double_backward(model, [weight]):
        loss = calibration_loss(model, batch)
        assert float(loss.detach()) == 0.0
        jacobian = torch.autograd.functional.jacobian(outputs, weight.detach()).flatten(1)
        expected = jacobian.T.detach() @ jacobian.detach() / 2  # two rows in the batch
        gradient = gradients(loss, {name: weight})[name]
        assert float(gradient.detach().abs().max()) == 0.0
        vector = random_direction(weight)
        product = hessian_product(gradient, weight, vector)
    assert torch.allclose(product.flatten(), expected @ vector.flatten(), rtol=1e-8, atol=1e-12)


def test_with_labels_it_is_the_models_loss():
    model, ids = tiny_llama(), torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad():
        assert torch.equal(calibration_loss(model, {"input_ids": ids}), model(input_ids=ids, labels=ids).loss)
        labels = ids.masked_fill(mask == 0, -100)
        own = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        assert torch.equal(calibration_loss(model, {"input_ids": ids, "attention_mask": mask}), own)
        classifier = tiny_bert()
        batch = {"input_ids": ids, "labels": torch.tensor([0, 2])}
        assert torch.equal(calibration_loss(classifier, batch), classifier(**batch).loss)


def test_flags_and_gradients_are_restored_also_after_an_error():
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    backends = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with torch.no_grad(), enable_double_backward(model, [weight]):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.layers.0.mlp.up_proj.weight"]
        gradients(calibration_loss(model, {"input_ids": torch.randint(3, 60, (2, 9))}), {"w": weight})
    with pytest.raises(RuntimeError, match="broke"), enable_double_backward(model, [weight]):
        raise RuntimeError("broke")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == backends
    assert all(p.grad is None for p in model.parameters())


def test_microbatches():
    batches = [
        {"input_ids": torch.arange(10).view(5, 2), "flag": True},
        {"input_ids": torch.arange(6).view(3, 2), "flag": False},
    ]
    everything = sample_microbatches(batches, 9, 2)
    assert [len(part["input_ids"]) for part in everything] == [2, 2, 1, 2, 1]
    assert [part["flag"] for part in everything] == [True, True, True, False, False]
    assert torch.equal(torch.cat([p["input_ids"] for p in everything]), torch.cat([b["input_ids"] for b in batches]))
    two = sample_microbatches(batches, 2, 2)
    assert [part["input_ids"][0, 0].item() for part in two] == [0, 8]


def test_batches_are_recorded_and_the_hook_is_removed():
    model, ids = tiny_llama(), torch.randint(3, 60, (2, 9))
    with RecordedBatches(model) as batches, torch.no_grad():
        model(input_ids=ids)
        model(input_ids=ids[:1], attention_mask=torch.ones(1, 9))
    assert [sorted(batch) for batch in batches] == [["input_ids"], ["attention_mask", "input_ids"]]
    assert batches[0]["input_ids"] is ids
    assert not model._forward_pre_hooks
