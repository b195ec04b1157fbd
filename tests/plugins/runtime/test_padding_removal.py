"""``padding_removal``: valid tokens equal stock's in float64, gradients too; what takes the stock forward; refusals."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import warnings

import pytest
import torch
import transformers
from tiny_models import tiny_bert, tiny_llama, tiny_vit
from transformers import AttentionInterface, AutoModel
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import ModelError, run_of
from hf_optim.toolkit import packing
from hf_optim.toolkit.packing import packed_encoder

STEP = {"technique": "padding_removal", "largest_share": 1.0}
SIZE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
SIZE |= {"max_position_embeddings": 40, "pad_token_id": 1}
MODERN = {"local_attention": 8, "global_attn_every_n_layers": 2, "eos_token_id": 2, "bos_token_id": 3}
MODERN |= {"cls_token_id": 3, "sep_token_id": 2}
DISTIL = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 40}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0}
ENCODERS = {
    "AlbertModel": {**SIZE, "embedding_size": 16},
    "BertModel": SIZE,
    "CamembertModel": SIZE,
    "DistilBertModel": {**DISTIL, "pad_token_id": 1},
    "ElectraModel": {**SIZE, "embedding_size": 16},
    "MPNetModel": SIZE,
    "ModernBertModel": {**SIZE, **MODERN},
    "RobertaModel": SIZE,
    "T5EncoderModel": T5,
    "XLMRobertaModel": SIZE,
}
HEADS = {
    "BertForSequenceClassification": SIZE,
    "BertForMaskedLM": SIZE,
    "RobertaForTokenClassification": SIZE,
    "RobertaForSequenceClassification": SIZE,
    "DistilBertForSequenceClassification": {**DISTIL, "pad_token_id": 1},
    "ElectraForSequenceClassification": {**SIZE, "embedding_size": 16},
    "MT5ForConditionalGeneration": T5,
}
LENGTHS = (17, 3, 9, 9, 1, 12)


def make(name, seed=0, **changes):
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    fields = {**(ENCODERS | HEADS)[name], **changes}
    config = cls.config_class(**fields)
    return cls(config).double().eval()


def batch(side="right", lengths=LENGTHS, length=17, seed=1):
    place, count = torch.arange(length), torch.tensor(lengths)[:, None]
    mask = place >= length - count if side == "left" else place < count
    if side == "holes":
        mask = mask.clone()
        mask[0, 4:7], mask[5, 3] = False, False
    ids = torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~mask, 1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def pack(model, share=1.0):
    packing.attach_packing(model, share, "test")
    return model


def valid(states, inputs):
    return states[inputs["attention_mask"].bool()]


class Rows:
    """Counts the rows that reach the linear layers of a model, so that a test knows that the batch was packed."""

    def __init__(self, model):
        self.seen = set()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, x: self.seen.add(x[0].shape[:-1].numel()))


# -- valid tokens -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("name", ENCODERS)
def test_valid_tokens_and_all_hidden_states_are_those_of_stock(name, side):
    model, inputs = make(name), batch(side)
    expected = model(**inputs, output_hidden_states=True)
    rows = Rows(pack(model))
    by_distance = packing.KINDS[model.config.model_type].by_distance
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = model(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for ours, stock in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(valid(ours, inputs), valid(stock, inputs), rtol=0, atol=1e-12)
    torch.testing.assert_close(valid(found[0], inputs), valid(expected[0], inputs), rtol=0, atol=1e-12)
    if by_distance and side == "holes":  # the stock forward, said once
        assert torch.equal(found[0], expected[0])
        assert "changes distances" in str(caught[0].message)
        return
    assert int(inputs["attention_mask"].sum()) in rows.seen
    assert inputs["input_ids"].numel() not in rows.seen
    assert not found[0][~inputs["attention_mask"].bool()].any()
    if side == "right" and getattr(expected, "pooler_output", None) is not None:
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_give_the_logits_of_stock(name, implementation):
    model, inputs = make(name), batch()
    model.set_attn_implementation(implementation)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    expected = model(**inputs).logits
    pack(model)
    found = model(**inputs).logits
    if found.shape[:2] == inputs["attention_mask"].shape and found.dim() == 3:
        expected, found = valid(expected, inputs), valid(found, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_mean_and_first_token_pooling_by_a_caller():
    model, inputs = make("BertModel"), batch()
    mask = inputs["attention_mask"][..., None]
    expected = model(**inputs)[0]
    found = pack(model)(**inputs)[0]
    torch.testing.assert_close((found * mask).sum(1), (expected * mask).sum(1), rtol=0, atol=1e-11)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=0, atol=1e-12)


def test_a_pooler_reads_the_first_valid_token_of_rows_padded_on_the_left():
    model, inputs = pack(make("BertModel")), batch("left")
    positions = inputs["attention_mask"].cumsum(1) - 1  # as if each row stood alone
    found = model(**inputs, position_ids=positions.clamp(min=0)).pooler_output
    for row, count in enumerate(LENGTHS):
        alone = inputs["input_ids"][row : row + 1, -count:]
        torch.testing.assert_close(found[row : row + 1], model(input_ids=alone).pooler_output, rtol=0, atol=1e-12)


def test_a_head_that_reads_the_first_column_takes_the_stock_forward_for_padding_on_the_left():
    model, inputs = make("RobertaForSequenceClassification"), batch("left")
    expected = model(**inputs).logits
    pack(model)
    with pytest.warns(UserWarning, match="reads the first column"):
        assert torch.equal(model(**inputs).logits, expected)
    model(**inputs)  # said once: warnings are errors here


def test_positions_token_types_and_embeddings_of_the_caller_are_packed():
    model, inputs = make("BertModel"), batch()
    shape = inputs["input_ids"].shape
    types = torch.arange(shape[1]).remainder(2).expand(shape).contiguous()
    positions = torch.arange(20, 20 + shape[1])[None]
    embeds = torch.randn(*shape, 32, dtype=torch.float64)
    for given in (
        {**inputs, "token_type_ids": types, "position_ids": positions},
        {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "token_type_ids": types},
    ):
        stock = make("BertModel")(**given)[0]
        torch.testing.assert_close(valid(pack(model)(**given)[0], inputs), valid(stock, inputs), rtol=0, atol=1e-12)
    roberta = make("RobertaModel")
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    stock = roberta(**given)[0]
    torch.testing.assert_close(valid(pack(roberta)(**given)[0], inputs), valid(stock, inputs), rtol=0, atol=1e-12)


def test_arguments_by_place_tuples_and_masks_of_other_types():
    model, inputs = make("BertModel"), batch()
    expected = model(**inputs)
    pack(model)
    for mask in (inputs["attention_mask"].bool(), inputs["attention_mask"].float()):
        states, pooled = model(inputs["input_ids"], mask, return_dict=False)
        torch.testing.assert_close(valid(states, inputs), valid(expected[0], inputs), rtol=0, atol=1e-12)
        torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=1e-12)


def test_rows_without_a_token_are_zero_and_change_no_other_row():
    model = pack(make("BertModel"))
    inputs, rest = batch(lengths=(5, 0, 9)), batch(lengths=(5, 9))
    rest["input_ids"] = inputs["input_ids"][[0, 2]]
    found, expected = model(**inputs), model(**rest)
    assert not found[0][1].any()
    torch.testing.assert_close(found[0][[0, 2]], expected[0], rtol=0, atol=1e-12)
    assert found.pooler_output.isfinite().all()
    nothing = batch(lengths=(0, 0))
    assert model(**nothing)[0].isfinite().all()  # the stock forward


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "MPNetModel", "T5EncoderModel", "ModernBertModel"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_stock(name, checkpointing):
    changes = {} if name in ("T5EncoderModel", "ModernBertModel") else {"hidden_dropout_prob": 0.0}
    if changes:
        changes["attention_probs_dropout_prob"] = 0.0
    model, inputs = make(name, **changes).train(), batch()
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            pytest.skip("the class has none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name is not in all supported versions
            model.gradient_checkpointing_enable()

    def gradients():
        model.zero_grad()
        out = model(**inputs)[0]
        (valid(out, inputs) if out.dim() == 3 else out).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    pack(model)
    found = gradients()
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-10)


def test_training_draws_dropout_and_stays_finite():
    torch.manual_seed(0)
    model, inputs = pack(make("BertModel").train()), batch()
    first, second = model(**inputs)[0], model(**inputs)[0]
    assert not torch.equal(first, second)
    first.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# -- attention ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reach", [None, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_ways_to_compute_attention_agree_with_the_formula(biased, reach):
    lengths = (1, 4, 4, 9)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    documents = packing.Documents.of(mask, packing.read_rows(mask), ordered=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(18, 3, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 3, 9, 9, generator=generator, dtype=torch.float64).requires_grad_() if biased else None
    parts, begin = [], 0
    for count in lengths:
        part = slice(begin, begin := begin + count)
        scores = torch.einsum("ihd,jhd->hij", q[part], k[part]) * 0.4
        if bias is not None:
            scores = scores + bias[0, :, :count, :count]
        if reach is not None:
            place = torch.arange(count)
            scores = scores.masked_fill((place[:, None] - place).abs() > reach, -torch.inf)
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[part]))
    expected, given = torch.cat(parts), [x for x in (q, k, v, bias) if x is not None]
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), given)
    ways = {
        "groups": lambda: packing.attend_groups(q, k, v, documents.lengths, 0.4, 0.0, bias, reach),
        "padded": lambda: packing.attend_padded(q, k, v, documents, 0.4, 0.0, bias, reach),
        "operator": lambda: torch.ops.hf_optim.attend_groups(q, k, v, documents.cu, 0.4, bias, reach),
    }
    for way, compute in ways.items():
        found = compute()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=way)
        for ours, gradient in zip(torch.autograd.grad((found * weight).sum(), given), wanted, strict=True):
            torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-12, msg=way)
    with torch.no_grad():
        torch.testing.assert_close(ways["groups"](), expected, rtol=0, atol=1e-12)


def test_no_tensor_has_a_pair_of_places_of_the_packed_row():
    model, inputs = pack(make("T5EncoderModel")), batch(lengths=(9,) * 12, length=17)
    total, largest = 9 * 12, []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with torch.no_grad(), Largest():
        model(**inputs)
    assert max(largest) < total * total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5EncoderModel"])
def test_compiled_once_for_all_batches(name):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = make(name)
    batches = [batch(lengths=tuple(range(2, 5 + k)), length=9 + k, seed=k) for k in range(6)]
    with torch.no_grad():
        expected = [model(**inputs)[0] for inputs in batches]
        pack(model)
        counter = CompileCounterWithBackend("eager")
        torch._dynamo.reset()
        compiled, counts = torch.compile(model, backend=counter), []
        for inputs, stock in zip(batches, expected, strict=True):
            out = compiled(**inputs)[0]
            if out.dim() == 3:
                out, stock = valid(out, inputs), valid(stock, inputs)
            torch.testing.assert_close(out, stock, rtol=0, atol=1e-12)
            counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] > 0
    assert counts[-1] == counts[2]  # the second batch makes lengths dynamic


# -- what takes the stock forward, and what is refused -----------------------------------------------------------------
def test_batches_without_padding_and_full_ones_take_the_stock_forward():
    model, inputs = make("BertModel"), batch()
    full = {"input_ids": inputs["input_ids"].clamp(min=4)}
    expected, padded = model(**full), model(**inputs)
    share = float(inputs["attention_mask"].float().mean())
    pack(model, share - 0.01)
    for given in (full, {**full, "attention_mask": torch.ones_like(full["input_ids"])}):
        assert torch.equal(model(**given)[0], expected[0])
    assert torch.equal(model(**inputs)[0], padded[0])  # padding, too, is as in stock
    pack(model, share + 0.01)
    assert not model(**inputs)[0][~inputs["attention_mask"].bool()].any()


def test_what_is_packed_already_or_asks_for_weights_is_refused():
    model, inputs = pack(make("BertModel")), batch()
    ids = inputs["input_ids"][:1, :12].clamp(min=4)
    twice = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    square = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    for given in (
        {"position_ids": twice},
        {"position_ids": twice, "attention_mask": torch.ones_like(ids)},
        {"position_ids": twice, "attention_mask": square},
        {"position_ids": twice, "cu_seq_lens_q": torch.tensor([0, 5, 8, 12])},
    ):
        with pytest.raises(ModelError, match="packed already"):
            model(input_ids=ids, **given)
    with pytest.raises(ModelError, match="3 dimensions"):
        model(input_ids=ids, attention_mask=torch.ones(1, 12, 12))
    with pytest.raises(ModelError, match="attention weights"):
        model(**inputs, output_attentions=True)
    stock = make("BertModel")(input_ids=ids, attention_mask=square)[0]
    with pytest.warns(UserWarning, match="four dimensions"):
        assert torch.equal(model(input_ids=ids, attention_mask=square)[0], stock)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (tiny_llama, "encoders of text"),
        (tiny_vit, "encoders of text"),
        (lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZE)), "compares all places"),
        (lambda: transformers.BertModel(transformers.BertConfig(**SIZE, is_decoder=True)), "decoder"),
    ],
)
def test_models_that_it_does_not_serve_are_refused(model, text):
    with pytest.raises(ModelError, match=text):
        hf_optim.optimize(model(), STEP)


def test_another_implementation_set_later_is_taken_over_or_leaves_the_padding():
    model, inputs = make("BertModel"), batch()
    expected = model(**inputs)[0]
    pack(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(valid(model(**inputs)[0], inputs), valid(expected, inputs), rtol=0, atol=1e-12)
    assert model.config._attn_implementation == "hf_optim_packed_eager"
    packing.detach_packing(model)
    assert model.config._attn_implementation == "eager"


# -- the life of a model -----------------------------------------------------------------------------------------------
def registered():
    gc.collect()
    keys = [*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping]
    return [key for key in keys if key.startswith("hf_optim_packed")]


def test_restore_gives_everything_back_and_unregisters():
    model, inputs = make("T5EncoderModel"), batch()
    classes, expected = [type(m) for m in model.modules()], model(**inputs)[0]
    assert not registered()
    hf_optim.optimize(model, STEP)
    assert type(model.encoder).__name__ == "T5Stack"
    assert len(registered()) == 2
    hf_optim.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert not registered()
    assert torch.equal(model(**inputs)[0], expected)
    hf_optim.accelerate(model)
    assert not model(**inputs)[0][~inputs["attention_mask"].bool()].any()
    hf_optim.restore(model)


def test_copies_and_pickles_are_packed_as_well():
    model, inputs = pack(make("BertModel")), batch()
    expected = model(**inputs)[0]
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    packing.detach_packing(model)
    for made in copies:
        assert torch.equal(made(**inputs)[0], expected)
        packing.detach_packing(made)
    assert not registered()


def test_a_checkpoint_says_it_and_stock_ignores_it(tmp_path):
    model = tiny_bert().eval()
    model = hf_optim.optimize(model, {"technique": "padding_removal", "largest_share": 0.8})
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["hf_optim_packing"] == {"largest_share": 0.8}
    assert stored["architectures"] == [type(tiny_bert()).__name__]
    assert run_of(model).record.reload == "STOCK_DENSE"
    cls = type(tiny_bert())
    inputs = batch(lengths=(4, 2, 9), length=12)
    inputs["input_ids"] %= tiny_bert().config.vocab_size
    auto = cls.from_pretrained(tmp_path, optim_config="auto").eval()
    given = cls.from_pretrained(tmp_path, optim_config={"technique": "padding_removal"}).eval()
    plain = cls.from_pretrained(tmp_path).eval()
    assert packing.packing_of(auto).largest_share == 0.8
    assert packing.packing_of(given).largest_share == 0.95
    assert packing.packing_of(plain) is None
    with torch.no_grad():
        expected = plain(**inputs)[0]
        for one in (auto, given):
            found = one(**inputs)[0]
            pairs = (found, expected) if found.dim() == 2 else (valid(found, inputs), valid(expected, inputs))
            torch.testing.assert_close(*pairs, rtol=0, atol=1e-5)
    for one in (model, auto, given):
        hf_optim.restore(one)


@pytest.mark.parametrize("entry", [True, {}, {"largest_share": "all"}, {"largest_share": 2}, {"share": 0.5}])
def test_a_damaged_entry_is_refused(entry, tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hf_optim_packing": entry}))
    with pytest.raises(ModelError, match="hf_optim_packing"):
        AutoModel.from_pretrained(tmp_path, optim_config="auto")


@pytest.mark.parametrize("steps", [[{"technique": "rtn", "scheme": "W8A8"}], [{"technique": "magnitude"}]])
def test_it_composes_with_quantized_and_pruned_layers(steps):
    model, inputs = make("BertForSequenceClassification").float(), batch()
    model = hf_optim.optimize(model, [*steps, STEP], kernels=True)
    rows = Rows(model)
    found = model(**inputs).logits
    assert inputs["input_ids"].numel() not in rows.seen
    packing.detach_packing(model)
    torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_adapters_compute_packed_rows(tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = make("BertForSequenceClassification"), batch()
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(pack(model), config).double().eval()
    found = model(**inputs).logits
    packing.detach_packing(model)
    torch.testing.assert_close(found, model(**inputs).logits, rtol=0, atol=1e-12)


def test_the_mask_is_read_once(monkeypatch):
    model, inputs = pack(make("BertModel")), batch()
    reads = []
    read = packed_encoder.read_rows
    monkeypatch.setattr(packed_encoder, "read_rows", lambda *args: reads.append(1) or read(*args))
    model(**inputs)
    assert len(reads) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel", "MPNetModel"])
@pytest.mark.parametrize("recorded", [False, True])
def test_valid_tokens_on_a_gpu(name, dtype, recorded):
    model, inputs = make(name).cuda(), {key: value.cuda() for key, value in batch().items()}
    expected = valid(model(**inputs)[0], inputs).detach()
    model = pack(model.to(dtype))
    with torch.set_grad_enabled(recorded):
        found = valid(model(**inputs)[0], inputs).detach().double()
    error = float((found - expected).norm() / expected.norm())
    assert error < {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]


@pytest.mark.real_model
@pytest.mark.smoke
def test_vectors_of_minilm_are_those_of_stock(minilm):
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["A cat.", "The weather is lovely today, and it will stay so.", "He drove to the stadium."] * 3
    inputs = tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]

    def vectors():
        return torch.nn.functional.normalize((model(**inputs)[0] * mask).sum(1) / mask.sum(1), dim=-1)

    with torch.no_grad():
        expected = vectors()
        hf_optim.optimize(model, STEP)
        torch.testing.assert_close(vectors(), expected, rtol=0, atol=1e-5)
    hf_optim.restore(model)
