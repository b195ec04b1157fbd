"""Patterns inside of transformers' models: padding, packing and generation as if each text were alone."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
import torch
from tiny_models import DECODER, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM, ModernBertConfig, ModernBertModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

from hf_optim.checkpoints.remote_code import joined
from hf_optim.toolkit.attention import (
    GLOBAL_TOKENS,
    STORED,
    Attachment,
    Band,
    Chunks,
    GlobalTokens,
    Pattern,
    chosen,
    whole,
    wholes,
)
from hf_optim.toolkit.attention import attend as ways
from hf_optim.toolkit.attention.attachment import mask
from hf_optim.toolkit.attention.rows import Rows

IDS = torch.randint(3, 50, (2, 23), generator=torch.Generator().manual_seed(0))
SHORT = 17
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt, "bert": lambda: tiny_bert().base_model}


def build(settings, layer, heads, causal):
    if settings["kind"] == "chunks":
        return [Pattern((Chunks(5 + layer),), causal)]
    if settings["kind"] == "ends":
        return [Pattern((Band(2, 2), GlobalTokens(1, 1)), causal)]
    return [Pattern((Band(3 + head, 3),), causal) for head in range(heads)]


ATTACHMENT = Attachment("hf_optim_test", build)


@pytest.fixture
def registered():
    ATTACHMENT.register()
    yield
    ATTACHMENT.unregister()


@pytest.fixture(params=["dense", "blocks"])
def way(request, monkeypatch):
    """Both ways to compute, at the lengths of these tests."""
    if request.param == "blocks":
        monkeypatch.setattr(ways, "SHORTEST", 1)
        monkeypatch.setattr(ways, "LARGEST_SHARE", 2.0)
        monkeypatch.setattr(ways, "BLOCK", 32)


def with_pattern(name, kind):
    model = MODELS[name]().double().eval()
    model.config.attention_pattern = {"kind": kind}
    model.set_attn_implementation(ATTACHMENT.name)
    return model


@torch.no_grad()
def outputs(model, ids, **inputs):
    return model(input_ids=ids, **inputs)[0]


def padded(side):
    """Return a batch whose second row is short, its mask, and where its tokens are."""
    at = slice(0, SHORT) if side == "right" else slice(IDS.shape[1] - SHORT, None)
    ids, valid = IDS.clone(), torch.ones_like(IDS)
    ids[1], valid[1] = IDS[1].roll(3), 0
    ids[1, at], valid[1, at] = IDS[1, :SHORT], 1
    return ids, valid, at


@pytest.mark.parametrize("kind", ["chunks", "heads", "ends"])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_is_computed_as_it_would_be_alone(registered, way, name, kind):
    model = with_pattern(name, kind)
    alone = outputs(model, IDS[1:, :SHORT])
    for side in ("right", "left"):
        ids, valid, at = padded(side)
        places = {} if name == "opt" else {"position_ids": (valid.cumsum(1) - 1).clamp_min(0)}
        both = outputs(model, ids, attention_mask=valid, **places)
        torch.testing.assert_close(both[1:, at], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(both[:1], outputs(model, IDS[:1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["chunks", "heads", "ends"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_documents_are_computed_as_they_would_be_alone(registered, way, name, kind):
    model = with_pattern(name, kind)
    ids = torch.cat([IDS[0], IDS[1, :SHORT]])[None]
    places = torch.cat([torch.arange(23), torch.arange(SHORT)])[None]
    packed = outputs(model, ids, position_ids=places, use_cache=False)
    torch.testing.assert_close(packed[:, :23], outputs(model, IDS[:1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[:, 23:], outputs(model, IDS[1:, :SHORT]), rtol=0, atol=1e-12)


WINDOWED = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "modernbert": (ModernBertConfig, ModernBertModel, {"pad_token_id": 0, "local_attention": 16}),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_rows_of_models_with_windows_of_their_own_are_computed_as_they_would_be_alone(registered, name):
    """Their masks restrict pairs, and tell padding and documents as well."""
    config, kind, more = WINDOWED[name]
    torch.manual_seed(0)
    model = kind(config(**{**DECODER, **more})).double().eval()
    model.config.attention_pattern = {"kind": "chunks"}
    model.set_attn_implementation(ATTACHMENT.name)
    alone = outputs(model, IDS[1:, :SHORT])
    for side in ("right", "left"):
        ids, valid, at = padded(side)
        both = outputs(model, ids, attention_mask=valid)
        torch.testing.assert_close(both[1:, at], alone, rtol=0, atol=1e-6)
    if name == "mistral":
        ids = torch.cat([IDS[0], IDS[1, :SHORT]])[None]
        places = torch.cat([torch.arange(23), torch.arange(SHORT)])[None]
        packed = outputs(model, ids, position_ids=places, use_cache=False)
        torch.testing.assert_close(packed[:, 23:], alone, rtol=0, atol=1e-6)


def test_a_mask_of_four_dimensions_does_not_tell_positions(registered):
    model, ids = with_pattern("llama", "chunks"), IDS[:1]
    mask = torch.ones(1, 1, 23, 23, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="the position of a token counts"):
        outputs(model, ids, attention_mask=mask, use_cache=False)
    for dtype in (torch.int32, torch.int64, torch.uint8):
        with pytest.raises(ValueError, match="must be bool or floating point"):
            outputs(model, ids, attention_mask=mask.to(dtype), use_cache=False)
    windows = with_pattern("llama", "heads")  # where only distances count
    found = outputs(windows, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(found, outputs(windows, ids), rtol=0, atol=1e-12)


def test_a_model_without_values_is_traced(registered):
    """``hf-optim check`` analyses checkpoints without reading them."""
    from torch._subclasses import FakeTensorMode

    valid = torch.ones(2, 6, dtype=torch.bool)
    with FakeTensorMode() as mode:
        assert handed(causal_mask_function, mode.from_tensor(valid)) is None


@pytest.mark.parametrize("kind", ["chunks", "heads"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generation_continues_as_without_a_cache(registered, name, kind):
    model = with_pattern(name, kind)
    settings = {"max_new_tokens": 6, "eos_token_id": -1, "do_sample": False, "pad_token_id": 0}
    made = model.generate(IDS[1:, :SHORT], **settings)
    assert torch.equal(outputs(model, made).argmax(-1)[:, SHORT - 1 : -1], made[:, SHORT:])
    ids, valid, _ = padded("left")
    both = model.generate(ids, attention_mask=valid, **settings)
    assert torch.equal(both[1:, 23:], made[:, SHORT:])


@pytest.mark.parametrize("name", MODELS)
def test_a_pattern_that_sees_all_is_the_stock_model_to_the_bit(registered, name):
    model = MODELS[name]().eval()
    stock = {length: outputs(model, IDS[:, :length]) for length in (4, 23)}
    model.config.attention_pattern = {"kind": "heads"}
    model.set_attn_implementation(ATTACHMENT.name)
    assert torch.equal(outputs(model, IDS[:, :4]), stock[4])  # the narrowest window sees three tokens on each side
    assert not torch.equal(outputs(model, IDS), stock[23])


def test_function_and_mask_come_and_go_together(registered):
    for interface in (AttentionInterface(), AttentionMaskInterface()):
        assert ATTACHMENT.name in interface
    ATTACHMENT.unregister()
    for interface in (AttentionInterface(), AttentionMaskInterface()):
        assert ATTACHMENT.name not in interface


def test_code_of_another_version_has_a_name_of_its_own():
    """Two checkpoints may bring code for one technique that computes differently."""
    text = "from hf_optim.toolkit.attention import Attachment, Band, Pattern\n"
    text += "def build(settings, layer, heads, causal):\n    return [Pattern((Band({reach}),), causal)]\n"
    text += "made = Attachment('hf_optim_technique', build)\n"
    spaces = [{"__name__": f"of_a_checkpoint_{reach}"} for reach in (1, 2)]
    for reach, space in enumerate(spaces, 1):
        exec(text.format(reach=reach), space)
    made = [space["made"] for space in spaces]
    try:
        for one in made:
            one.register()
        found = [AttentionInterface()[one.name].__self__ for one in made]
        assert found == made
    finally:
        for one in made:
            one.unregister()


# -- the mask ---------------------------------------------------------------------------------------------------------
def handed(function, attention_mask=None, q_length=6, kv_length=6, **offsets):
    return mask(
        batch_size=2, q_length=q_length, kv_length=kv_length, mask_function=function, attention_mask=attention_mask,
        device=torch.device("cpu"), **offsets,
    )  # fmt: skip


def test_whole_rows_need_nothing():
    for function in (causal_mask_function, bidirectional_mask_function):
        assert handed(function) is None
        assert handed(function, torch.ones(2, 6, dtype=torch.bool)) is None


def test_padding_and_documents_become_segments():
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    found = handed(causal_mask_function, valid)
    assert found[:, 0, 0].tolist() == [[0, 0, 0, 0, -1, -1], [-1, 0, 0, 0, 0, 0]]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2]])
    found = handed(and_masks(causal_mask_function, packed_sequence_mask_function(documents)))
    assert torch.equal(found[:, 0, 0].long(), documents)


def test_a_step_says_where_its_queries_are():
    found = handed(causal_mask_function, q_length=1, kv_length=6, q_offset=3)
    assert found.hf_optim_rows.offset == 3


def test_another_restriction_of_the_model_is_kept_as_a_mask():
    found = handed(and_masks(causal_mask_function, sliding_window_overlay(2)))
    place = torch.arange(6)
    distance = place[:, None] - place
    assert torch.equal(found.expand(2, 1, 6, 6)[0, 0], (distance >= 0) & (distance < 2))


def test_segments_that_lost_their_facts_are_read_again(registered):
    module = tiny_llama().model.layers[0].self_attn.double().eval()
    module.config.attention_pattern = {"kind": "chunks"}
    parts = [torch.randn(2, heads, 6, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    valid = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]).bool()
    segments = handed(causal_mask_function, valid)
    kept, _ = ATTACHMENT.attention(module, *parts, segments)
    assert torch.equal(ATTACHMENT.attention(module, *parts, segments.clone())[0], kept)


def test_rows_know_what_they_hold():
    rows = Rows.of(torch.tensor([[0, 0, 1, 1], [-1, 0, 0, 0]], dtype=torch.int32))
    assert (rows.left, rows.packed, rows.whole) == (True, True, False)
    assert rows.positions()[0].tolist() == [0, 1, 0, 1]
    assert rows.positions()[1, 1:].tolist() == [0, 1, 2]


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_what_is_not_computed_is_refused(registered):
    module = tiny_llama().model.layers[0].self_attn
    parts = [torch.randn(1, heads, 6, 8) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match=r"needs config\.attention_pattern"):
        ATTACHMENT.attention(module, *parts, None)
    module.config.attention_pattern = {"kind": "chunks"}
    with pytest.raises(ValueError, match="soft cap"):
        ATTACHMENT.attention(module, *parts, None, softcap=30.0)
    with pytest.raises(ValueError, match="attention sinks"):
        ATTACHMENT.attention(module, *parts, None, s_aux=torch.zeros(4))


def test_settings_that_nothing_reads_are_refused(registered):
    config = tiny_llama().config
    config.attention_pattern = {"kind": "chunks", "knid": "heads"}
    with pytest.raises(ValueError, match=r"settings that it does not know: \['knid'\]"):
        ATTACHMENT.require_settings(config)
    config.attention_pattern = {"kind": "chunks"}
    ATTACHMENT.require_settings(config)


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, "4", True, None, [4]])
def test_settings_of_a_damaged_file_are_refused(value):
    with pytest.raises(ValueError, match="not a whole number from 1"):
        whole({"block": value}, "block", low=1)
    with pytest.raises(ValueError, match="not one of"):
        chosen({"kind": value}, "kind", ("strided", "fixed"))
    with pytest.raises(ValueError, match="attention pattern"):
        wholes({"positions": [value, 2**40] if value is None else value or "x"}, "positions", low=5)


# -- what is stored with checkpoints ----------------------------------------------------------------------------------
def test_the_stored_modules_are_one_text_without_a_name_used_twice():
    tree = ast.parse(joined(*STORED, *GLOBAL_TOKENS))
    defined = Counter()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] += 1
        elif isinstance(node, ast.Assign):
            defined.update(target.id for target in node.targets if isinstance(target, ast.Name))
    assert [name for name, count in defined.items() if count > 1] == []
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    standard = {"__future__", "collections", "dataclasses", "functools", "importlib", "json", "os", "pathlib", "typing"}
    standard |= {"copy", "inspect", "math", "sys", "weakref", "zlib"}
    assert roots - standard == {"torch", "transformers"}
