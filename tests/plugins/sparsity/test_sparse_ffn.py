"""sparse_ffn: one unit of each block, in training and inference, of models that were dense and of random ones."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5, tiny_vit
from torch import nn
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModelForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim_plugins.sparsity import _sparse_ffn_codes, _sparse_ffn_controller, _sparse_ffn_kernel
from hf_optim_plugins.sparsity._sparse_ffn_controller import Controller, Units
from hf_optim_plugins.sparsity._sparse_ffn_modules import SparseFFN, gathered_tokens
from hf_optim_plugins.sparsity.sparse_ffn import SparseFFN as Step

STEP = {"technique": "sparse_ffn", "block": 4, "rank": 4, "epochs": 2}
ENTRY = {
    "width": 16, "neurons": 32, "out": 12, "block": 4, "rank": 3, "act": "relu", "gated": False, "bias": False,
    "out_bias": True, "controller_bias": True, "temperature": 0.1, "hard_share": 0.3, "controller_output": False,
    "gather_rows": 8, "bits": 16, "group": None,
}  # fmt: skip


def layer(dtype=torch.float64, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SparseFFN({**ENTRY, **fields}, {"dtype": dtype}).eval()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return made


def draw(*size, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse(model, *more, **fields):
    step = {k: v for k, v in {**STEP, **fields}.items() if v is not None}
    data = [inputs_for(model, seed=seed) for seed in range(2)]
    return hf_optim.optimize(model, [step, *more], calibration=data)


def logits(model, seed=9):
    with torch.no_grad():
        return model(**inputs_for(model, seed=seed)).logits


def layers_of(model):
    return {name: m for name, m in model.named_modules() if type(m).__name__ == "PlacedSparseFFN"}


# -- the layer --------------------------------------------------------------------------------------------------------
def test_one_unit_of_each_block_adds_to_the_output():
    ffn, x = layer(), draw(5, 16)
    logits = (x @ ffn.controller_in.T @ ffn.controller_out.T + ffn.controller_bias).view(5, 8, 4)
    mask = F.one_hot(logits.argmax(-1), 4).view(5, 32)
    expected = (F.relu(x @ ffn.up.T) * mask) @ ffn.down + ffn.bias
    torch.testing.assert_close(ffn(x), expected, rtol=1e-12, atol=1e-12)
    ffn.entry["gather_rows"] = 0
    torch.testing.assert_close(ffn(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ffn(x.view(5, 1, 16)), expected.view(5, 1, 12), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [2, 4, 8, 32])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_reading_chosen_rows_is_the_masked_layer(block, bits):
    own = {"gated": True, "act": "silu", "bias": True, "controller_output": True}
    ffn, x = layer(block=block, **(own if block == 4 else {})), draw(8, 16)
    if bits < 16:
        ffn.encode_(bits, 4)
    assert "up" not in dict(ffn.named_parameters()) or bits == 16
    gathered = ffn(x)
    ffn.entry["gather_rows"] = 0
    torch.testing.assert_close(gathered, ffn(x), rtol=1e-12, atol=1e-12)


def test_blocks_of_one_unit_are_the_dense_layer():
    ffn, x = layer(block=1, rank=0), draw(5, 16)
    assert ffn.controller_in is None
    expected = F.linear(F.relu(F.linear(x, ffn.up)), ffn.down.t(), ffn.bias)
    assert torch.equal(ffn(x), expected)
    assert torch.equal(ffn.train()(x), expected)


def test_in_training_a_share_of_calls_picks_and_the_others_mix_by_the_softmax():
    ffn, x = layer().train(), draw(6, 16)
    soft = ffn.logits(x).softmax(-1)
    hard = 0
    torch.manual_seed(0)
    for _ in range(400):
        mask = ffn.training_mask(ffn.logits(x))
        picks = bool(((mask - 0.5).abs() - 0.5).abs().max() < 1e-12)
        hard += picks
        assert picks or torch.allclose(mask, soft)
        assert torch.allclose(mask.sum(-1), torch.ones(6, 8).double())
    assert 0.2 < hard / 400 < 0.4
    # Without noise the pick is the argmax; with much of it, any unit.
    for temperature, same in ((0.0, True), (1e6, False)):
        ffn.entry |= {"hard_share": 1.0, "temperature": temperature}
        assert torch.equal(ffn.training_mask(ffn.logits(x)).argmax(-1), soft.argmax(-1)) is same


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_the_gradient_of_the_controller_is_that_of_the_softmax(hard):
    ffn, x = layer(hard_share=hard).train(), draw(6, 16)
    torch.manual_seed(3)
    mask = ffn.training_mask(ffn.logits(x))
    upstream = draw(*mask.shape, seed=4)
    (found,) = torch.autograd.grad((mask * upstream).sum(), [ffn.controller_in])
    (expected,) = torch.autograd.grad((ffn.logits(x).softmax(-1) * upstream).sum(), [ffn.controller_in])
    torch.testing.assert_close(found, expected)
    ffn(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in ffn.parameters())


def test_the_softmax_multiplies_where_a_unit_was_picked():
    ffn, x = layer(controller_output=True, hard_share=1.0, temperature=0.0).train(), draw(6, 16)
    soft = ffn.logits(x).softmax(-1)
    mask = ffn.training_mask(ffn.logits(x))
    torch.testing.assert_close(mask, F.one_hot(soft.argmax(-1), 4) * soft)
    torch.testing.assert_close(ffn(x), ffn.eval()(x))
    ffn.entry["hard_share"] = 0.0
    torch.testing.assert_close(ffn.training_mask(ffn.logits(x)), soft)


def test_gradients_in_evaluation_reach_the_chosen_units_alone():
    ffn, x = layer(), draw(3, 16).requires_grad_(True)
    ffn(x).sum().backward()
    gathered = ffn.up.grad.clone(), ffn.down.grad.clone(), x.grad.clone()
    ffn.zero_grad()
    x.grad = None
    ffn.entry["gather_rows"] = 0
    ffn(x).sum().backward()
    for found, expected in zip(gathered, (ffn.up.grad, ffn.down.grad, x.grad), strict=True):
        torch.testing.assert_close(found, expected)
    assert ffn.controller_in.grad is None


@pytest.mark.parametrize("rows", [0, 8])
@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_as_one_graph(rows, training):
    ffn, x = layer(gather_rows=rows).train(training), draw(3, 16)
    compiled = torch.compile(ffn, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    found = compiled(x)
    torch.manual_seed(0)
    assert torch.allclose(found, ffn(x))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("rows", [0, 8])
def test_autocast_reads_chosen_rows_as_it_masks(rows, bits):
    ffn, x = layer(torch.float32, gather_rows=rows, bits=bits, bias=True), draw(3, 16).float()
    with torch.no_grad():
        expected = ffn(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = ffn(x)
    assert found.dtype == torch.bfloat16
    assert float((found - expected).abs().max()) < 2e-2 * float(expected.abs().max())


def test_a_model_compiles_as_one_graph():
    model = sparse(tiny_llama(num_hidden_layers=1)).eval()
    given = {"input_ids": torch.arange(3, 9).view(1, 6), "use_cache": False}
    with torch.no_grad():
        expected = model(**given).logits
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(**given).logits, expected)


def test_kernels_are_called_in_inference_and_in_one_graph(monkeypatch):
    monkeypatch.setattr(_sparse_ffn_kernel, "SPARSE_FFN_DEVICES", ("cpu",))
    ffn, x, calls = layer(torch.float32), draw(3, 16).float(), []
    kernels = _sparse_ffn_kernel.find_sparse_ffn_kernel()
    compute = kernels.compute
    monkeypatch.setattr(kernels, "compute", lambda *given: calls.append(1) or compute(*given))
    expected = ffn(x)  # with a gradient: plain PyTorch
    assert not calls
    with torch.no_grad():
        assert torch.allclose(ffn(x), expected)
        assert len(calls) == 1
        monkeypatch.setattr(kernels, "compute", compute)
        assert torch.allclose(torch.compile(ffn, backend="eager", fullgraph=True)(x), expected)


def test_codes_round_to_the_nearest():
    weight = draw(6, 24)
    for bits, group in ((8, None), (8, 12), (4, 6), (4, None)):
        codes, scale = _sparse_ffn_codes.encode_rows(weight, bits, group)
        assert codes.shape == (6, 24 if bits == 8 else 12)
        assert scale.shape == (6, 24 // (group or 24))
        found = _sparse_ffn_codes.decode_rows(codes, scale, bits)
        bound = scale.repeat_interleave(group or 24, 1) / 2
        assert bool(((found - weight).abs() <= bound * (1 + 1e-9)).all())
    zeros = torch.zeros(2, 8)
    assert torch.equal(_sparse_ffn_codes.decode_rows(*_sparse_ffn_codes.encode_rows(zeros, 4, None), 4), zeros)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 5}, "blocks of 5 units do not divide 32"),
        ({"rank": 17}, "from 1 to the width 16, not 17"),
        ({"block": 1}, "nothing to choose"),
        ({"act": "nothing"}, "not one of transformers' activations"),
        ({"bits": 3}, "16, 8 or 4 bits"),
        ({"bits": 4, "group": 5}, "groups of 5 weights do not divide rows of 16"),
        ({"hard_share": 1.5}, "hard_share"),
        ({"width": 0}, "width must be a whole number of at least 1"),
        ({"rank": 1.0}, "rank must be a whole number"),
    ],
)
def test_settings_that_cannot_be_computed_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SparseFFN({**ENTRY, **change})
    for name in ENTRY:
        with pytest.raises(ValueError, match=f"lack {name}"):
            SparseFFN({key: value for key, value in ENTRY.items() if key != name})


# -- conversion -------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gpt2, tiny_bert, tiny_t5, tiny_vit])
def test_the_converted_layers_are_the_dense_ones_without_the_other_units(build):
    dense = build().double()
    model = sparse(copy.deepcopy(dense))
    assert len(layers_of(model)) == (4 if build is tiny_t5 else 2)
    expected = logits(dense)
    for ffn in layers_of(model).values():
        ffn.entry = {**ffn.entry, "block": 1}  # all units on: a permutation of the dense layer
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_blocks_of_one_unit_leave_the_model_as_it_was(build):
    dense = build()
    model = sparse(copy.deepcopy(dense), block=1, rank=None)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-6)


def test_units_that_are_needed_together_lie_in_different_blocks():
    # Units 2i and 2i + 1 are used by the same tokens, those of other pairs never with them.
    mass = torch.zeros(400, 8)
    for token in range(400):
        pair = token % 4
        mass[token, 2 * pair : 2 * pair + 2] = 1 + 0.01 * torch.arange(2)
    order = _sparse_ffn_controller.exclusive_order(mass, 4)
    assert sorted(order.tolist()) == list(range(8))
    table = mass[:, order].view(400, 2, 4)
    assert float(table.amax(-1).sum()) == pytest.approx(float(mass.sum()))
    given = mass.view(400, 2, 4).amax(-1).sum()
    assert float(given) < 0.6 * float(mass.sum())


def test_a_controller_learns_which_unit_contributes_most():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 12, generator=random)
    truth = Controller(torch.randn(3, 12, generator=random), torch.randn(24, 3, generator=random), torch.zeros(24))
    mass = F.linear(F.linear(x, truth.first), truth.second).exp()
    found = _sparse_ffn_controller.train_controller(x[:1200], mass[:1200], 4, 3, True, 20, 0, "step")
    table = mass[1200:].view(300, 6, 4)
    kept = [_sparse_ffn_controller.kept_share(table, _sparse_ffn_controller.choices(x[1200:], c, 4))
            for c in (found, truth)]  # fmt: skip
    assert kept[1] == pytest.approx(float(table.amax(-1).sum() / table.sum()))
    assert kept[0] > 0.97 * kept[1]


def test_contributions_are_lengths_of_what_a_unit_adds():
    up, down, x = draw(6, 4), draw(6, 5, seed=2), draw(7, 4, seed=3)
    found = _sparse_ffn_controller.contributions(x, Units((up, None), None, down), F.silu)
    expected = (F.silu(x @ up.T).unsqueeze(-1) * down).norm(dim=-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_random_start_draws_all_weights_and_scales_the_last_matrix():
    model = tiny_opt()
    start = sparse(copy.deepcopy(model), start="random", kernel_scaling=True)
    ffn = next(iter(layers_of(start).values()))
    std = model.config.initializer_range if hasattr(model.config, "initializer_range") else 0.02
    assert float(ffn.up.detach().std()) == pytest.approx(std, rel=0.15)
    assert float(ffn.down.detach().std()) == pytest.approx(2 * std, rel=0.15)
    # From the configuration alone.
    again = type(start)(start.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in start.named_parameters()}
    assert float(next(iter(layers_of(again).values())).up.detach().std()) > 0


def test_generate_reads_chosen_rows_and_gives_the_tokens_of_the_whole_forward():
    model = sparse(tiny_llama())
    ids = inputs_for(model, seed=5, rows=1)["input_ids"]
    made = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for ffn in layers_of(model).values():
        ffn.entry["gather_rows"] = 0
    with torch.no_grad():
        whole = model(made.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_how_many_tokens_read_rows():
    assert [gathered_tokens(block) for block in (1, 2, 4, 8, 16, 64)] == [0, 2, 4, 8, 8, 8]


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_written_when_the_stage_is_complete(bits, tmp_path):
    plain, model = sparse(tiny_llama()), sparse(tiny_llama(), bits=bits, group_size=16)
    for name, ffn in layers_of(model).items():
        other = layers_of(plain)[name]
        for matrix in ("up", "gate", "down"):
            codes, scale = _sparse_ffn_codes.encode_rows(getattr(other, matrix).detach(), bits, 16)
            assert torch.equal(getattr(ffn, f"{matrix}_codes"), codes)
            assert torch.equal(getattr(ffn, f"{matrix}_scale"), scale)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(model))
    other = copy.deepcopy(plain)
    other.encode_units(bits, 16)
    assert torch.equal(logits(other), logits(model))
    assert other.config.sparse_ffn == model.config.sparse_ffn


def test_a_plain_trainer_trains_it(tmp_path):
    model = hf_optim.release(sparse(tiny_opt(), start="random"))
    rows = [{"input_ids": ids, "labels": ids} for ids in inputs_for(model, seed=3, rows=8)["input_ids"]]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        before = float(model.eval()(**batch).loss)
    settings = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=5e-3, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    start = next(iter(layers_of(model).values())).controller_in.clone()
    Trainer(model=model, args=settings, train_dataset=rows).train()
    with torch.no_grad():
        assert float(model.eval()(**batch).loss) < 0.7 * before
    assert not torch.equal(next(iter(layers_of(model).values())).controller_in, start)


def test_nothing_is_kept_between_forwards_and_a_copy_has_its_own_input():
    model = sparse(tiny_llama())
    expected, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    for ffn in layers_of(twin).values():
        assert ffn.inlet[0] in set(twin.modules())
        assert ffn.inlet[0].kept.is_empty()
    with pytest.raises(RuntimeError, match="without its first projection"):
        next(iter(layers_of(model).values()))(torch.zeros(1, 0))


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": 5}, "blocks of 5 units do not divide the 48 units of .*divisor: 2, 3, 4, 6"),
        ({"rank": 64}, "rank of 64|controller of rank 64 is no smaller"),
        ({"bits": 4, "group_size": 20}, "groups of 20 weights do not divide rows of 32"),
        ({"targets": ["*.q_proj"]}, "no feed-forward layer to make sparse"),
    ],
)
def test_a_model_whose_layers_do_not_fit_is_refused(fields, message):
    with pytest.raises(ModelError, match=message):
        sparse(tiny_llama(), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": 1, "rank": 4}, "nothing to choose"),
        ({"kernel_scaling": True}, "start='random'"),
        ({"group_size": 16}, "set bits to 8 or 4"),
        ({"bits": 5}, "bits"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": "sparse_ffn", **fields}])


def test_models_without_feed_forward_layers_of_their_own_are_refused():
    small = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4}
    model = AlbertForMaskedLM(AlbertConfig(**small, intermediate_size=48, num_hidden_layers=2)).eval()
    with pytest.raises(ModelError, match="no feed-forward layer to make sparse"):
        sparse(model)


def test_quantized_and_sparse_models_are_refused():
    data = [inputs_for(tiny_llama(), seed=0)]
    with pytest.raises(RecipeError, match="needs a model that has floating-point weights"):
        hf_optim.optimize(tiny_llama(), [{"technique": "rtn", "bits": 8}, STEP], calibration=data)
    with pytest.raises((ModelError, RecipeError), match=r"code of its own|feed-forward"):
        sparse(tiny_llama(), {**STEP})


def test_quantization_behind_it_leaves_the_units_alone(tmp_path):
    model = sparse(tiny_llama(), {"technique": "rtn", "bits": 8}, bits=8)
    assert "up_codes" in dict(next(iter(layers_of(model).values())).named_buffers())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(model))


def test_a_checkpoint_whose_settings_were_damaged_is_refused(tmp_path):
    sparse(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    first = config["sparse_ffn"]["modules"]["model.layers.0.mlp.down_proj"]
    first["block"] = 7
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="blocks of 7 units do not divide 48"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    del first["block"]
    path.write_text(json.dumps(config))
    with pytest.raises((ValueError, KeyError, hf_optim.OptimError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_the_code_of_a_checkpoint_needs_no_hf_optim():
    text = Step.remote_code.source
    assert "hf_optim" not in text.replace("hf_optim_", "")
