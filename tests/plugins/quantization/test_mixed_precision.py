"""Mixed precision of activations: with 16 bits everywhere it is dense, and a brute-force ablation chooses the same."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama, tiny_opt, tiny_vit

import hf_optim
from hf_optim import RecipeError, Reload, compressed, run_of
from hf_optim.testing.outliers import add_synthetic_outliers
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim_plugins.quantization.mixed_precision import MixedPrecision


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def calibrated(model, batches, **fields):
    return hf_optim.optimize(model, [MixedPrecision(**fields)], calibration=batches)


def batches_of(model, count=3):
    return [inputs_for(model, seed=s, rows=4) for s in range(count)]


def kl(reference, other):
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def together(model, inputs):
    """Return the names of linears grouped by their input, in order."""
    seen, held = {}, []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ("layers" in name or "encoder.layer" in name):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: (
                        (held.append(args[0]), seen.setdefault(id(args[0]), []).append(name))[:0] or None
                    )
                )
            )
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return list(seen.values())


def ablation(model, batches):
    """Return the divergence of the logits with one input alone rounded to its asymmetric 8-bit grid."""
    reference = [logits(model, batch) for batch in batches]
    found = {}
    for members in together(model, batches[0]):
        layer = model.get_submodule(members[0])
        ends = []
        handle = layer.register_forward_pre_hook(lambda _, args, ends=ends: ends.append(torch.aminmax(args[0])))
        for batch in batches:
            logits(model, batch)
        handle.remove()
        low = min(0.0, *(float(e.min) for e in ends))
        high = max(0.0, *(float(e.max) for e in ends))
        scale = (high - low) / 255
        zero = round(-128 - low / scale)

        def rounded(_, args, scale=scale, zero=zero):
            return (((args[0] / scale).round() + zero).clamp(-128, 127).sub(zero).mul(scale),)

        handles = [model.get_submodule(name).register_forward_pre_hook(rounded) for name in members]
        shifts = [kl(r, logits(model, batch)) for r, batch in zip(reference, batches, strict=True)]
        for each in handles:
            each.remove()
        found[frozenset(members)] = sum(shifts) / len(shifts)
    return found


@pytest.mark.many(every=4)
@pytest.mark.parametrize("sites", ["linears", "all"])
@pytest.mark.parametrize("family", [tiny_llama, tiny_bert, tiny_vit])
def test_with_16_bits_everywhere_the_outputs_do_not_change(family, sites):
    model = family()
    batches = batches_of(model)
    before = logits(model, batches[0])
    wide = calibrated(copy.deepcopy(model), batches, tolerance=0.0, sites=sites, bits=8)
    eight_bit_weights = hf_optim.optimize(model, [{"technique": "rtn"}], calibration=batches)
    report = run_of(wide).record.steps["0"]
    assert report["sites_with_16_bits"] == report["sites"]
    assert torch.allclose(logits(wide, batches[0]), logits(eight_bit_weights, batches[0]), atol=1e-5)
    assert not torch.equal(logits(wide, batches[0]), before)


def test_without_weights_16_bits_everywhere_is_bit_exact():
    model = tiny_llama()
    batches = batches_of(model)
    before = logits(model, batches[0])
    assert torch.equal(logits(calibrated(model, batches, tolerance=0.0, sites="all", bits=None), batches[0]), before)


@pytest.mark.parametrize("family", [tiny_llama, tiny_opt, tiny_bert])
def test_the_chosen_set_is_the_one_a_brute_force_ablation_ranks_first(family):
    model = family()
    if family is not tiny_bert:
        add_synthetic_outliers(model, factor=60.0, pairs=False)
    batches = batches_of(model)
    by_hand = ablation(model, batches)
    expected = sorted(by_hand, key=lambda members: -by_hand[members])
    made = calibrated(model, batches, budget=0.5, tolerance=0.0)
    report = run_of(made).record.steps["0"]
    count = report["sites_with_16_bits"]
    assert count == len(expected) // 2
    chosen = {
        name
        for name, m in compressed.quantized_modules(made).items()
        if m.quantization_scheme.input_activations is None
    }
    assert chosen == set().union(*expected[:count])
    assert list(report["ranking"].values()) == pytest.approx([by_hand[m] for m in expected], rel=1e-2, abs=2e-7)


def test_sites_of_synthetic_outliers_get_16_bits():
    model = tiny_llama()
    outliers = add_synthetic_outliers(model, factor=100.0, pairs=False)
    made = calibrated(model, batches_of(model), budget=0.5, tolerance=0.0)
    chosen = {
        name
        for name, m in compressed.quantized_modules(made).items()
        if m.quantization_scheme.input_activations is None
    }
    assert chosen == outliers.inputs.keys() - {"lm_head"}


def test_the_tolerance_is_met_by_the_fewest_of_the_ranking():
    model = tiny_llama()
    add_synthetic_outliers(model, factor=60.0)
    batches = batches_of(model)
    made = calibrated(copy.deepcopy(model), batches, tolerance=0.05)
    report = run_of(made).record.steps["0"]
    assert 0 < report["sites_with_16_bits"] < report["sites"]
    assert report["divergence"] <= 0.05 < report["divergence_all_8_bits"]
    one_less = calibrated(
        model, batches, tolerance=0.0, budget=(report["sites_with_16_bits"] - 1) / report["sites"] + 1e-9
    )
    assert run_of(one_less).record.steps["0"]["divergence"] > 0.05


def test_a_generous_tolerance_leaves_everything_at_8_bits():
    model = tiny_llama()
    made = calibrated(model, batches_of(model), tolerance=1e3)
    assert run_of(made).record.steps["0"]["sites_with_16_bits"] == 0
    schemes = [m.quantization_scheme for m in compressed.quantized_modules(made).values()]
    assert all(s.input_activations is not None and not s.input_activations.dynamic for s in schemes)


def test_residual_sums_take_part_on_request_and_need_remote_code():
    assert MixedPrecision().reload() is Reload.STOCK_FORMAT
    assert MixedPrecision(sites="all").reload() is Reload.REMOTE_CODE
    model = tiny_bert()
    made = calibrated(model, batches_of(model), sites="all", tolerance=1e3)
    assert type(made).__name__ == "MixedPrecisionBertForSequenceClassification"
    norms = [name for name, m in made.named_modules() if type(m).__name__ == "RoundedNorm"]
    assert "bert.encoder.layer.0.output.LayerNorm" in norms
    assert len(norms) == 5


@pytest.mark.parametrize("sites", ["linears", "all"])
def test_it_reloads_with_equal_outputs(sites, tmp_path):
    model = tiny_llama()
    add_synthetic_outliers(model, factor=60.0)
    batches = batches_of(model)
    made = calibrated(model, batches, tolerance=0.01, sites=sites)
    made.save_pretrained(tmp_path / "out")
    again = type(made).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again, batches[0]), logits(made, batches[0]))


def test_the_card_has_the_ranking():
    class Card:
        def __init__(self):
            self.texts, self.tables = [], []

        def paragraph(self, title, markdown):
            self.texts.append(markdown)

        def table(self, title, header, rows):
            self.tables.append((header, rows))

    model, card = tiny_llama(), Card()
    made = calibrated(model, batches_of(model), budget=0.25, tolerance=0.0)
    run = run_of(made)
    run.recipe.steps[0].export(run, None, card)
    ((header, rows),) = card.tables
    assert header == ["read by", "divergence", "bits"]
    assert [row[2] for row in rows] == [16, 16, 8, 8, 8, 8, 8, 8]
    assert "2 of 8" in card.texts[0]
    assert rows[0][0].count(",") in (0, 1, 2)


def test_a_step_that_would_do_nothing_is_refused():
    with pytest.raises(RecipeError, match="quantizes nothing"):
        MixedPrecision(bits=None, tolerance=0.0)
