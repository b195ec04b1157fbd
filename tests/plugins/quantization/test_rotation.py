"""Rotations: exact before quantization, refused where they are not, and their effect after it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from double_precision import exact_logits
from real_stories import windows
from tiny_models import TINY, tiny_bert, tiny_llama, tiny_mixtral, tiny_qwen2
from transformers import AutoModelForCausalLM

from hf_optim import ModelError, OptimConfig, RecipeError, Scope, accelerate, optimize, run_of
from hf_optim.checkpoints.dense import convert_to_dense
from hf_optim.lifecycle.stages import start_run
from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation.orthogonal import orthogonality_error, random_rotation
from hf_optim.toolkit.statistics import sample_microbatches
from hf_optim_plugins.quantization import _rotation_fit, rotation
from hf_optim_plugins.quantization._rotation_modules import block_of, hadamard_blocks, rotated_input
from hf_optim_plugins.quantization.rotation import Rotation

IDS = torch.randint(3, 60, (6, 20), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "Qwen3": {},
    "Gemma": {},
    "GPTNeoX": {},
    "Phi": {},
    "Cohere": {},
    "Olmo": {},
    "Granite": {},
    "Qwen3Moe": EXPERTS,
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
}
POST_NORM = {"Gemma2": {}, "Olmo2": {}}


def build(family):
    """Return a tiny model in float64 whose gains and biases are random."""
    if family in TINY:
        model = TINY[family]()
    else:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SIZES, **{**KINDS, **POST_NORM}[family])
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model = model.double().eval()
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # torch has no grouped product in float64
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def inputs_of(model):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, value in topology.dummy_inputs(model).items():
        shape = (3, *value.shape[1:])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) if value.is_floating_point() else None
        made[name] = torch.randint(3, 60, shape, generator=generator) if drawn is None else drawn
    return made


def rotated_(model, inputs, **fields):
    """Call the hook over the whole model, and return the run with its record."""
    recipe = OptimConfig.parse([Rotation.from_dict(fields)])
    run = start_run(recipe, model.config)
    run.model = model
    with torch.no_grad():
        for _ in recipe.steps[0].calibrate(run, Scope("", model, model)):
            model(**inputs)
    return run


@pytest.mark.many(every=4)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "vit", "t5", "mixtral", *KINDS])
def test_rotations_leave_the_outputs_as_they_are(family):
    model = build(family)
    inputs = inputs_of(model)
    before, start = exact_logits(model, inputs), copy.deepcopy(model.state_dict())
    run = rotated_(model, inputs)
    found = run.record.steps["0"]
    assert found["streams"] == 1
    assert found["attentions"] >= 2
    torch.testing.assert_close(exact_logits(model, inputs), before, rtol=0, atol=1e-10)
    touched, _ = run.covered(run.recipe.steps[0])
    same = [name for name in touched if f"{name}.weight" in start and torch.equal(
        model.state_dict()[f"{name}.weight"], start[f"{name}.weight"])]  # fmt: skip
    assert touched
    assert not same
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", *POST_NORM])
def test_a_stream_behind_norms_with_gains_is_left_and_its_values_are_rotated(family):
    model = build(family)
    inputs = inputs_of(model)
    before = exact_logits(model, inputs)
    run = rotated_(model, inputs)
    assert {**run.record.steps["0"], "technique": ""} == {
        "technique": "", "streams": 0, "attentions": 2, "head_untied": False,
    }  # fmt: skip
    torch.testing.assert_close(exact_logits(model, inputs), before, rtol=0, atol=1e-10)
    _, skipped = run.covered(run.recipe.steps[0])
    assert any("cannot move into the weights behind it" in reason for reason in skipped)
    with pytest.raises(ModelError, match=r"nothing of .* can be rotated in residual .*cannot move into the weights"):
        rotated_(model, inputs, where=["residual"])


def test_an_encoder_that_returns_its_stream_is_refused():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4})
    with pytest.raises(ModelError, match=r"can be rotated in residual .*returns"):
        rotated_(transformers.LlamaModel(config).eval(), {"input_ids": IDS}, where=["residual"])


def test_a_tied_head_is_untied_and_stays_untied_when_loaded(tmp_path):
    model = tiny_qwen2()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.model.norm.weight.add_(torch.randn(32, generator=generator) * 0.3)
        before = model(IDS).logits
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = optimize(model, [{"technique": "rotation"}, {"technique": "rtn", "bits": 8}], calibration=IDS)
    assert run_of(model).record.steps["0"]["head_untied"]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not loaded.config.tie_word_embeddings
    assert "rotated" in (tmp_path / "saved" / "README.md").read_text()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
        assert float((loaded(IDS).logits - before).norm() / before.norm()) < 0.05


def test_checking_leaves_the_model_as_it_is():
    model = tiny_qwen2()
    before = copy.deepcopy(model.state_dict())
    Rotation().check_model(model, "step 1 (rotation)")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ModelError, match=r"step 1 .*nothing of BertForSequenceClassification can be rotated"):
        Rotation(where=("residual",)).check_model(tiny_bert(), "step 1 (rotation)")


def test_routers_choose_the_same_experts():
    model = tiny_mixtral()
    seen = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda module, args, out: seen.append(out[-1].sort().values))
    with torch.no_grad():
        model(IDS)
        rotated_(model, {"input_ids": IDS})
        seen = [seen[0]]
        model(IDS)
    handle.remove()
    assert torch.equal(*seen)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_rotated_inputs_leave_the_outputs_as_they_are(family, tmp_path):
    model = build(family)
    inputs = inputs_of(model)
    before = exact_logits(model, inputs)
    run = rotated_(model, inputs, online=True)
    assert run.record.steps["0"]["rotated_inputs"] == 2
    torch.testing.assert_close(exact_logits(model, inputs), before, rtol=0, atol=1e-10)
    layers = [module for module in model.modules() if type(module).__name__ == "RotatedInput"]
    assert [layer.block for layer in layers] == [{"llama": 32, "opt": 32, "gpt2": 128}[family]] * 2


@pytest.mark.parametrize(("width", "block"), [(24, 16), (24, 8), (344, 256), (43, 32)])
def test_blocks_that_overlap_are_undone_in_the_other_order(width, block):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = rotated_input(x, block)
    torch.testing.assert_close(rotated_input(found, block, inverse=True), x)
    matrix = rotated_input(torch.eye(width, dtype=torch.float64), block)
    assert orthogonality_error(matrix) < 1e-12
    torch.testing.assert_close(x @ matrix, found)


@pytest.mark.parametrize(("width", "block"), [(14336, 2048), (4096, 4096), (352, 256), (172, 128), (48, 32), (64, 64)])
def test_the_block_is_the_largest_that_divides_the_width_or_two_overlap(width, block):
    assert block_of(width) == block


def test_the_transform_is_sylvesters_and_its_own_inverse():
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.kron(torch.kron(pairs, pairs), pairs) / 8**0.5
    torch.testing.assert_close(hadamard_blocks(x, 8), (x.view(3, 3, 8) @ matrix).view(3, 24))
    torch.testing.assert_close(hadamard_blocks(hadamard_blocks(x, 8), 8), x)


def test_a_checkpoint_with_rotated_inputs_brings_its_code(tmp_path):
    steps = [{"technique": "rotation", "online": True}, {"technique": "rtn", "bits": 4, "activations": "int4"}]
    model = optimize(tiny_llama(), steps, calibration=IDS)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


ROTARY = ["llama", "qwen2", "mixtral", "Qwen3", "Gemma", "Gemma2", "GPTNeoX", "Phi", "Cohere"]


@pytest.mark.parametrize("family", ROTARY)
def test_rotated_queries_and_keys_leave_the_outputs_as_they_are(family):
    """With fewer keys than queries (GQA), with rotary embeddings of part of a head (Phi), and with padding."""
    model = build(family)
    inputs = inputs_of(model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :3] = inputs["attention_mask"][1, -2:] = 0
    before = exact_logits(model, inputs)
    run = rotated_(model, inputs, queries_and_keys=True, where=["values"])
    assert run.record.steps["0"]["rotated_scores"] == 2
    torch.testing.assert_close(exact_logits(model, inputs), before, rtol=0, atol=1e-12)


def test_a_cache_holds_the_rotated_keys_and_scores_are_equal():
    model = build("llama")
    stock = copy.deepcopy(model)
    rotated_(model, {"input_ids": IDS}, queries_and_keys=True, where=["residual"])
    with torch.no_grad():
        outputs = [one(IDS, use_cache=True).past_key_values for one in (model, stock)]
    found, expected = ([layer.keys for layer in cache.layers] for cache in outputs)
    for rotated, plain in zip(found, expected, strict=True):
        assert float((rotated - plain).norm()) > 0.1 * float(plain.norm())
        torch.testing.assert_close(rotated, hadamard_blocks(plain, plain.shape[-1]), rtol=0, atol=1e-5)
    config = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    tokens = [one.generate(IDS, attention_mask=mask, **config) for one in (model, stock)]
    assert torch.equal(*tokens)


def test_a_checkpoint_with_rotated_queries_and_keys_brings_its_code(tmp_path):
    steps = [{"technique": "rotation", "queries_and_keys": True}, {"technique": "rtn", "bits": 8}]
    model = optimize(tiny_llama(), steps, calibration=IDS)
    with torch.no_grad():
        logits = model(IDS).logits
    model.save_pretrained(tmp_path / "saved")
    assert "Queries and keys of 2 attention layers" in (tmp_path / "saved" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    attention = loaded.model.layers[1].self_attn
    assert type(attention).__name__ == "LlamaAttention"
    assert type(attention) is not transformers.models.llama.modeling_llama.LlamaAttention
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, logits)
        assert torch.equal(copy.deepcopy(loaded)(IDS).logits, logits)


def test_rotated_queries_and_keys_compile_without_a_break():
    model = tiny_llama()
    rotated_(model, {"input_ids": IDS}, queries_and_keys=True)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(IDS).logits
        torch.testing.assert_close(compiled, model(IDS).logits, rtol=0, atol=1e-6)


def test_a_dense_model_is_an_ordinary_one_again():
    steps = [{"technique": "rotation", "online": True, "queries_and_keys": True}, {"technique": "rtn", "bits": 8}]
    model = optimize(tiny_llama(), steps, calibration=IDS)
    with torch.no_grad():
        logits = model(IDS).logits
        assert convert_to_dense(model) == []
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=1e-5)
    stock = transformers.models.llama.modeling_llama
    assert type(model) is stock.LlamaForCausalLM
    assert type(model.model.layers[0].self_attn) is stock.LlamaAttention
    assert "model.layers.0.mlp.down_proj.weight" in model.state_dict()


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5"])
def test_a_model_without_rotary_embeddings_is_refused(family):
    with pytest.raises(ModelError, match="turns both by one rotary embedding"):
        Rotation(queries_and_keys=True).check_model(build(family), "step 1 (rotation)")


def test_stacked_experts_are_refused_or_named(caplog):
    with pytest.raises(ModelError, match="but those of stacked experts, whose neurons are computed and read in one"):
        Rotation(online=True).check_model(build("mixtral"), "step 1 (rotation)")
    model = build("Qwen2Moe")
    inputs = inputs_of(model)
    before = exact_logits(model, inputs)
    run = rotated_(model, inputs, online=True)
    assert "inputs of the stacked experts in 2 modules are not rotated at run time" in caplog.text
    assert run.record.steps["0"]["rotated_inputs"] == 2  # of the shared experts
    torch.testing.assert_close(exact_logits(model, inputs), before, rtol=0, atol=1e-10)


def test_kernels_rotate_and_round_inputs_at_once(monkeypatch):
    """W8A8 on kernels: the layers behind rotations take the input as it is where their packed weight can rotate it."""
    steps = [{"technique": "rotation", "online": True}, {"technique": "rtn", "bits": 8, "activations": "int8"}]
    model = optimize(tiny_llama(), steps, calibration=IDS)
    accelerate(model)
    layers = [module.inner for module in model.modules() if type(module).__name__ == "RotatedInput"]
    assert [type(layer).__name__ for layer in layers] == ["PackedLinear"] * 2
    with torch.no_grad():
        two_passes = model(IDS).logits
    seen = []

    def at_once(packed, x, block):
        seen.append(block)
        return packed(rotated_input(x, block))

    kind = type(layers[0].packed_weight)
    monkeypatch.setattr(kind, "rotated_forward", at_once, raising=False)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, two_passes, rtol=0, atol=1e-6)
        assert seen == [32, 32]
        handle = layers[0].register_forward_pre_hook(lambda module, args: None)  # which must see a rotated input
        torch.testing.assert_close(model(IDS).logits, two_passes, rtol=0, atol=1e-6)
    handle.remove()
    assert seen == [32, 32, 32]


def with_outliers():
    """Return a tiny Llama, two of whose channels of the residual stream are large."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [3, 17]] *= 30
    return model


def test_learned_rotations_are_orthogonal_and_never_worse_than_their_start():
    model = with_outliers()
    sites = rotation.find(model, rotation.SITES, "")
    for stream in sites.streams:
        rotation.rotating.fold_gains_(model, stream.norms)
    generator = torch.Generator().manual_seed(0)
    streams = [random_rotation(each.width, generator) for each in sites.streams]
    heads = [torch.stack([random_rotation(each.width, generator) for _ in each.rows]) for each in sites.heads]
    layers = Scope("", model, model).select(("Linear",), ())
    simulated = _rotation_fit.Simulated(layers, 4, None, True, 4)
    start = copy.deepcopy(model.state_dict())
    batches = sample_microbatches([{"input_ids": IDS}], 16, 3)
    for rate, steps in ((0.1, 12), (1.5, 4)):
        fit = _rotation_fit.RotationFit(model, sites.streams, sites.heads, simulated, list(streams), list(heads))
        fit.learn(batches, steps, rate)
        assert fit.mean_loss(batches) == pytest.approx(min(fit.losses), rel=1e-6)
        assert min(fit.losses) <= fit.losses[0]
        for found in (*fit.stream_rotations, *fit.head_rotations):
            assert orthogonality_error(found) < 1e-6
        if rate == 0.1:
            assert min(fit.losses) < 0.95 * fit.losses[0]
            assert not torch.equal(fit.stream_rotations[0], streams[0])
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_simulated_loss_is_that_of_the_quantized_model():
    """The loss of the fit equals the divergence of the model that rotation and rtn make."""
    model = with_outliers()
    with torch.no_grad():
        expected = model(IDS).logits.log_softmax(-1)
    fields = {"method": "learned", "steps": 1, "rate": 1e-9, "rows": 6}
    steps = [{"technique": "rotation", **fields}, {"technique": "rtn", "bits": 4, "activations": "int4"}]
    model = optimize(model, steps, calibration=IDS)
    with torch.no_grad():
        found = model(IDS).logits.log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert run_of(model).record.steps["0"]["loss_after"] == pytest.approx(divergence, rel=2e-2)


def test_rounded_tokens_are_those_of_the_stored_scheme():
    from hf_optim import compressed

    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    for name, bits in (("int8", 8), ("int4", 4)):
        quantize = compressed.input_quantizer(compressed.scheme_of(None, name))
        torch.testing.assert_close(_rotation_fit.rounded_tokens(x, bits), quantize(x))


def test_outliers_of_the_stream_cost_less_with_rotations():
    def error(steps):
        model = with_outliers()
        with torch.no_grad():
            before = model(IDS).logits
            model = optimize(model, [*steps, {"technique": "rtn", "bits": None, "activations": "int4"}])
            return float((model(IDS).logits - before).norm() / before.norm())

    assert error([{"technique": "rotation"}]) < 0.8 * error([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"where": []}, "where names one or both of residual, values"),
        ({"where": ["queries"]}, "where names one or both of residual, values"),
        ({"method": "learned", "bits": None, "activation_bits": None}, "need bits or activation_bits"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        Rotation.from_dict(fields)


def test_it_must_be_followed_by_a_quantizer():
    with pytest.raises(RecipeError, match="must be followed by a quantization step"):
        optimize(tiny_llama(), {"technique": "rotation"}, calibration=IDS)


def test_scales_may_be_moved_before_and_masks_only_after():
    """A rotation mixes channels: it undoes masks before it, and scales before it are its input."""
    quantizer = {"technique": "rtn", "bits": 4}
    OptimConfig.parse([{"technique": "smoothquant"}, {"technique": "rotation"}, quantizer]).check()
    OptimConfig.parse([{"technique": "rotation"}, {"technique": "smoothquant"}, quantizer]).check()
    found = OptimConfig.parse([{"technique": "magnitude"}, {"technique": "rotation"}, quantizer])
    with pytest.raises(RecipeError, match="spars"):
        found.check()


@pytest.mark.real_model
def test_it_helps_four_bit_inputs_on_a_real_model(shared_models, shared_data):
    """stories260k, with weights and inputs of 4 bits, on a small part of the evaluation text."""
    from hf_optim.evaluation.evaluate import perplexity

    home = shared_models / "stories260k"
    held_out = windows(home, shared_data, "eval", 8)
    dense = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    rtn = {"technique": "rtn", "bits": 4, "group_size": 32, "activations": "int4"}
    recipes = [[rtn], [{"technique": "rotation", "online": True}, rtn]]
    found = [perplexity(optimize(copy.deepcopy(dense), steps), held_out)["perplexity"] for steps in recipes]
    assert found[1] < 0.98 * found[0]
