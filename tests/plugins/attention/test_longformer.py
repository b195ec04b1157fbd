"""Longformer: against the softmax under the paper's mask, transformers' class, and the dense model at its limits."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_oracle import LONG, MODELS, assert_same, batch, bert, by_blocks, llama, roberta
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
    LongformerConfig,
    LongformerForMultipleChoice,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerForTokenClassification,
    LongformerModel,
    Trainer,
    TrainingArguments,
)

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.testing.models import _build

SEP = 7  # an id whose tokens are global


def convert(model, **fields):
    return hf_optim.optimize(copy.deepcopy(model), [{"technique": "longformer", "window": 6, **fields}])


def positions(valid):
    """Return the position of each token in its row without padding."""
    return (valid.long().cumsum(1) - 1).masked_fill(~valid, -1)


def mask(valid, is_global, half, step=1, causal=False):
    """Return bool ``[B, 1, N, N]`` by the paper's definition."""
    place = torch.arange(valid.shape[1])
    distance = place[:, None] - place
    near = (distance.abs() <= half * step) & (distance % step == 0)
    seen = near | is_global[:, :, None] | is_global[:, None, :]
    if causal:
        seen = seen & (distance >= 0)
    return (seen & valid[:, :, None] & valid[:, None, :])[:, None]


@pytest.mark.many
@pytest.mark.parametrize("way", ["dense", "blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_static_global_tokens_are_the_softmax_under_the_mask(name, way, monkeypatch):
    model = MODELS[name]()
    converted = convert(model, global_first=2, global_positions=[20])
    if way == "blocks":
        by_blocks(monkeypatch, converted)
    inputs, valid = batch(model, padding=None if name == "vit" else "right")
    place = positions(valid)
    found = ((place < 2) | (place == 20)) & valid
    assert_same(model, converted, lambda layer: mask(valid, found, 3, causal=name == "llama"), inputs, valid)


@pytest.mark.many
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("way", ["dense", "blocks"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "t5_encoder"])
def test_global_tokens_that_differ_by_row(name, way, padding, monkeypatch):
    model = MODELS[name]()
    converted = convert(model, global_token_ids=[SEP], global_last=1)
    if way == "blocks":
        by_blocks(monkeypatch, converted)
    inputs, valid = batch(model, padding=padding)
    marks = torch.zeros_like(inputs["input_ids"])
    marks[0, 50], marks[1, [60, 61, 3]] = 1, 1  # one of them is padding on the left
    place = positions(valid)
    found = (inputs["input_ids"] == SEP) | marks.bool() | (place == 0) | (place == valid.sum(1, keepdim=True) - 1)
    found &= valid
    assert len(set(found.sum(1).tolist())) == 2
    assert_same(model, converted, lambda layer: mask(valid, found, 3), inputs, valid, {"global_attention_mask": marks})


def test_dilation_by_layer_and_head(monkeypatch):
    model = bert()
    converted = convert(model, dilations=[1, 3], dilated_heads=2)
    by_blocks(monkeypatch, converted)
    inputs, valid = batch(model)
    found = positions(valid) == 0

    def masks(layer):
        each = [mask(valid, found, 3, step) for step in ((3, 3, 1, 1) if layer else (1,) * 4)]
        return torch.cat(each, 1)

    assert_same(model, converted, masks, inputs, valid)


@pytest.mark.parametrize("way", ["dense", "blocks"])
def test_projections_of_global_tokens_are_those_of_the_stock_class(way, monkeypatch):
    """Random projections, global tokens from the batch: transformers' LongformerModel computes the same."""
    stock = stock_longformer().double()
    converted = hf_optim.optimize(copy.deepcopy(stock), [{"technique": "longformer", "global_first": 0}])
    assert type(converted).__name__ == "LongformerRobertaModel"
    assert converted.config.attention_pattern["windows"] == [4, 8]
    if way == "blocks":
        by_blocks(monkeypatch, converted)
    inputs, valid = batch(stock, padding="right")
    for marks in (torch.zeros_like(inputs["input_ids"]), (inputs["input_ids"] % 9 == 0).long()):
        with torch.no_grad():
            expected = stock(**inputs, global_attention_mask=marks)
            found = converted(**inputs, global_attention_mask=marks)
        torch.testing.assert_close(found[0][valid], expected[0][valid], rtol=0, atol=2e-6)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=2e-6)


def stock_longformer(model_class=LongformerModel):
    config = LongformerConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LONG + 2, attention_window=[4, 8], type_vocab_size=1, pad_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return _build(model_class, config, 0)


@pytest.mark.parametrize(
    ("model_class", "first"),
    [(LongformerModel, 0), (LongformerForTokenClassification, 0), (LongformerForSequenceClassification, 1)],
)
def test_a_stock_longformer_without_marks_computes_the_same(model_class, first):
    stock = stock_longformer(model_class).double()
    with pytest.raises(ModelError, match=f"set global_first to {first}, not {1 - first}"):
        hf_optim.optimize(copy.deepcopy(stock), [{"technique": "longformer", "global_first": 1 - first}])
    converted = hf_optim.optimize(copy.deepcopy(stock), [{"technique": "longformer", "global_first": first}])
    inputs, valid = batch(stock, padding="right")
    with torch.no_grad():
        expected, found = stock(**inputs)[0], converted(**inputs)[0]
    at = valid if found.dim() == 3 else slice(None)
    torch.testing.assert_close(found[at], expected[at], rtol=0, atol=2e-6)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("model_class", [LongformerForQuestionAnswering, LongformerForMultipleChoice])
def test_stock_classes_that_find_the_question_are_refused(model_class, first):
    with pytest.raises(ModelError, match=f"{model_class.__name__} finds the tokens of the question"):
        hf_optim.optimize(stock_longformer(model_class), [{"technique": "longformer", "global_first": first}])


def test_projections_start_as_copies_and_are_trained():
    model = bert()
    plain, own = convert(model), convert(model, global_projections=True)
    inputs, _ = batch(model, padding="right")
    torch.testing.assert_close(own(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-10)
    own(**inputs).logits.sum().backward()
    for name in ("query_global", "key_global", "value_global"):
        assert float(getattr(own.bert.encoder.layer[0].attention.self, name).weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_the_stock_class_computes_the_same(name, tmp_path, stock):
    """BERT and RoBERTa as transformers' Longformer: equal to ours with the same global tokens, and to plain loading."""
    model = {"bert": bert, "roberta": roberta}[name]()
    ours = convert(model, global_first=0 if name == "roberta" else 1, window=4)
    theirs = convert(model, stock_class=True, window=4)
    assert type(theirs).__module__.startswith("transformers.")
    assert hf_optim.run_of(theirs).record.reload == "STOCK_ARCH"
    inputs, valid = batch(model, padding="right")
    marks = (inputs["input_ids"] % 9 == 0).long()
    more = {"global_attention_mask": marks} if name == "roberta" else {}
    with torch.no_grad():
        found, expected = theirs(**inputs, **more).logits, ours(**inputs, **more).logits
    at = valid if found.dim() == 3 else slice(None)
    torch.testing.assert_close(found[at], expected[at], rtol=0, atol=2e-6)  # its softmax is in float32
    theirs.save_pretrained(tmp_path)
    auto = "AutoModelForMaskedLM" if name == "roberta" else "AutoModelForSequenceClassification"
    reloaded = stock.load(tmp_path, auto, {**inputs, **more})
    assert not reloaded.missing
    torch.testing.assert_close(reloaded.output[at], found[at], rtol=0, atol=0)


def bart(model_class=BartForConditionalGeneration, **fields):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "init_std": 0.3}
    model = model_class(BartConfig(**{**sizes, **heads, "max_position_embeddings": 40, **fields})).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize("model_class", [BartModel, BartForConditionalGeneration])
def test_a_bart_becomes_transformers_led_whose_encoder_has_windows(model_class, tmp_path, stock):
    model = bart(model_class).double()
    theirs = convert(model, stock_class=True)
    assert type(theirs).__name__ == model_class.__name__.replace("Bart", "LED")
    assert hf_optim.run_of(theirs).record.reload == "STOCK_ARCH"
    generator = torch.Generator().manual_seed(1)
    ids, told = (torch.randint(3, 60, (2, count), generator=generator) for count in (39, 7))
    valid = torch.arange(39) < torch.tensor([[39], [23]])
    inputs = {"input_ids": ids, "attention_mask": valid.long(), "decoder_input_ids": told}
    with torch.no_grad():
        seen = mask(valid, torch.zeros_like(valid), 3) | ~valid[:, None, :, None]  # no row of padding without keys
        states = model.get_encoder()(ids, attention_mask=seen)
        more = {"attention_mask": valid.long(), "decoder_input_ids": told}
        expected, full = model(encoder_outputs=states, **more)[0], model(**inputs)[0]
        found = theirs(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # its softmax is in float32
    assert float((found - full).abs().max()) > 1e-2
    theirs.float().save_pretrained(tmp_path)
    auto = "AutoModel" if model_class is BartModel else "AutoModelForSeq2SeqLM"
    reloaded = stock.load(tmp_path, auto, inputs)
    assert not reloaded.missing
    with torch.no_grad():
        torch.testing.assert_close(reloaded.output, theirs(**inputs)[0], rtol=0, atol=0)


def test_a_bart_that_led_does_not_express_is_refused():
    with pytest.raises(ModelError, match="does not express BartForSequenceClassification"):
        convert(bart(BartForSequenceClassification), stock_class=True)
    with pytest.raises(ModelError, match="does not scale embeddings"):
        convert(bart(scale_embedding=True), stock_class=True)
    with pytest.raises(ModelError, match="cross-attention"):
        convert(bart())


def test_a_checkpoint_with_projections_and_ids_outlives_the_tool(tmp_path, stock):
    converted = convert(bert().float(), global_token_ids=[SEP], global_projections=True)
    with torch.no_grad():
        for layer in converted.bert.encoder.layer:
            layer.attention.self.query_global.weight.mul_(1.5)
    inputs, _ = batch(converted, padding="left")
    inputs["global_attention_mask"] = (inputs["input_ids"] == 9).long()
    with torch.no_grad():
        expected = converted(**inputs).logits
    converted.save_pretrained(tmp_path)
    reloaded = stock.load(tmp_path, "AutoModelForSequenceClassification", inputs, trust_remote_code=True)
    assert not reloaded.missing
    torch.testing.assert_close(reloaded.output, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("marks", "words"), [(torch.ones(2, 5), r"has the shape \(2, 5\)"), (torch.full((2, 31), 2), "this one has 2")]
)
def test_marks_of_other_shapes_and_values_are_refused(marks, words):
    with pytest.raises(ValueError, match=words):
        convert(bert())(torch.full((2, 31), 5), global_attention_mask=marks)


def test_the_body_alone_finds_global_tokens_and_a_part_of_it_says_that_it_cannot():
    converted = convert(bert(), global_token_ids=[SEP])
    inputs, _ = batch(converted)
    whole, alone = converted(**inputs, output_hidden_states=True).hidden_states[-1], converted.bert(**inputs)[0]
    assert torch.equal(whole, alone)
    with pytest.raises(ValueError, match="call the model"):
        converted.bert.encoder(converted.bert.embeddings(inputs["input_ids"]))
    embedded = converted.bert.embeddings.word_embeddings(inputs["input_ids"])
    with pytest.raises(ValueError, match="pass input_ids"):
        converted(inputs_embeds=embedded)
    marked = converted(inputs_embeds=embedded, global_attention_mask=(inputs["input_ids"] == SEP).long()).logits
    torch.testing.assert_close(marked, converted(**inputs).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_batches_in_turn(reentrant):
    """The backward of a first batch, after the forward of a second one, has the global tokens of the first."""
    converted = convert(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), global_token_ids=[SEP]).train()
    batches = [batch(converted, seed=seed, padding="right")[0] for seed in (0, 1)]
    weight = converted.bert.embeddings.word_embeddings.weight

    def gradients(turn):
        found = []
        values = [converted(**inputs).logits.sum() for inputs in batches] if turn else []
        for number, inputs in enumerate(batches):
            weight.grad = None
            (values[number] if turn else converted(**inputs).logits.sum()).backward()
            found.append(weight.grad)
        return found

    expected = gradients(turn=False)
    enable = getattr(converted, "activation_checkpointing_enable", None) or converted.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    for one, other in zip(gradients(turn=True), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_copy_computes_the_same():
    converted = convert(bert(), global_token_ids=[SEP], global_projections=True)
    inputs, _ = batch(converted)
    twin = copy.deepcopy(converted)
    assert torch.equal(twin(**inputs).logits, converted(**inputs).logits)
    assert type(twin.bert) is type(converted.bert)


def test_a_trainer_keeps_the_column_of_marks(tmp_path):
    converted = convert(bert().float())
    settings = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(converted, settings)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "global_attention_mask", "labels"} <= set(trainer._signature_columns)


def test_limits_are_the_dense_model():
    model = bert()
    inputs, _ = batch(model, padding="right")
    expected = model(**inputs).logits
    wide = {"window": 2 * LONG}
    for fields in ({**wide, "global_first": 0}, {"global_first": LONG}, {**wide, "global_token_ids": [SEP]}):
        torch.testing.assert_close(convert(model, **fields)(**inputs).logits, expected, rtol=0, atol=1e-10)
    everything = torch.ones_like(inputs["input_ids"])
    found = convert(model)(**inputs, global_attention_mask=everything).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_causal_model_does_not_see_later_tokens():
    converted = convert(llama(), global_positions=[30])
    inputs, _ = batch(converted)
    before = converted(**inputs).logits
    inputs["input_ids"][:, 100] += 1
    after = converted(**inputs).logits
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


@pytest.mark.many
@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"window": 0}, RecipeError, "window"),
        ({"window": 7}, RecipeError, "even, not 7"),
        ({"global_positions": [-1]}, RecipeError, "counts from 0"),
        ({"global_positions": [LONG]}, ModelError, f"rows of at most {LONG}"),
        ({"global_first": LONG + 1}, ModelError, f"rows of at most {LONG}"),
        ({"global_token_ids": [64]}, ModelError, "vocabulary has 64"),
        ({"dilations": [0]}, RecipeError, "at least 1"),
        ({"dilations": [1, 2, 3]}, ModelError, "3 dilations, and the model 2 layers"),
        ({"dilations": [2], "dilated_heads": 5}, ModelError, "5 dilated heads of 4"),
        ({"dilated_heads": 1}, RecipeError, "needs dilations"),
        ({"stock_class": True, "global_token_ids": [7]}, RecipeError, "global_attention_mask"),
    ],
)
def test_bad_settings_are_refused_before_work(fields, error, words):
    with pytest.raises(error, match=words):
        convert(bert(), **fields)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama", {"global_token_ids": [7]}, "is causal"),
        ("llama", {"global_projections": True}, "turns queries and keys"),
        ("vit", {"global_token_ids": [7]}, "no token has an id"),
        ("vit", {"global_projections": True}, "separate projections"),
        ("distilbert", {"stock_class": True}, "does not express DistilBert"),
    ],
)
def test_models_that_do_not_fit_are_refused(name, fields, words):
    with pytest.raises(ModelError, match=words):
        convert(MODELS[name](), **fields)


@pytest.mark.many
@pytest.mark.parametrize(
    "damage",
    [
        {"windows": [7]}, {"windows": [0]}, {"windows": "4"}, {"windows": []}, {"global_first": -1},
        {"global_token_ids": {"a": 1}}, {"global_positions": [True]}, {"global_projections": "yes"}, {"dilations": [0]},
    ],
)  # fmt: skip
def test_damaged_settings_are_refused(damage):
    converted = convert(bert())
    converted.config.attention_pattern = {**converted.config.attention_pattern, **damage}
    with pytest.raises(ValueError, match="the attention pattern has"):
        converted(**batch(converted)[0])


def test_marks_that_do_not_fit_are_refused():
    converted = convert(bert())
    inputs, _ = batch(converted)
    for marks in (torch.ones(2, 3), 2 * torch.ones_like(inputs["input_ids"])):
        with pytest.raises(ValueError, match="1 for global tokens and 0 for others"):
            converted(**inputs, global_attention_mask=marks)


def test_a_stock_checkpoint_is_loaded_onto_lists_of_blocks(tmp_path):
    stock = stock_longformer()
    stock.save_pretrained(tmp_path)
    step = {"technique": "longformer", "global_first": 0}
    converted = LongformerModel.from_pretrained(tmp_path, optim_config={"steps": [step]}).eval()
    assert type(converted).__name__ == "LongformerRobertaModel"
    inputs, valid = batch(stock, padding="right")
    marks = (inputs["input_ids"] % 9 == 0).long()
    with torch.no_grad():
        expected = stock(**inputs, global_attention_mask=marks)[0]
        found = converted(**inputs, global_attention_mask=marks)[0]
    torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=2e-5)


def test_marks_that_a_model_does_not_pass_on_are_refused(monkeypatch):
    """A head that drops keywords, and a body whose layers do: the marks would be lost without a word."""
    converted = convert(bert())
    inputs, _ = batch(converted)
    marks = (inputs["input_ids"] == SEP).long()
    encoder = converted.bert.encoder
    passing = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda states, mask=None, *args, **kwargs: passing(states, mask))
    with pytest.raises(ValueError, match="BertModel does not pass global_attention_mask on"):
        converted(**inputs, global_attention_mask=marks)
    monkeypatch.setattr(encoder, "forward", passing)
    body = converted.bert.forward
    monkeypatch.setattr(converted.bert, "forward", lambda ids, attention_mask=None, **kwargs: body(ids, attention_mask))
    with pytest.raises(ValueError, match="LongformerBertForSequenceClassification does not pass"):
        converted(**inputs, global_attention_mask=marks)
    converted(**inputs)
