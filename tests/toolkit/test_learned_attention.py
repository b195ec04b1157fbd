"""The frame of attention with learned parts: padding, documents, caches, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import textwrap

import elu_attention
import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from hf_optim.checkpoints.remote_code import convert
from hf_optim.toolkit import compat
from hf_optim.toolkit.attention import LearnedAttachment, StateLayer, TensorState, add_parts, attentions
from hf_optim_plugins.attention._learned import learned_code

DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]
CODE = learned_code("elu", (elu_attention,), "EluConfig")
IDS = torch.randint(3, 60, (3, 13), generator=torch.Generator().manual_seed(0))


def converted(make, width=None):
    model = make().eval()
    config = model.config
    settings = {"head_width": width or config.hidden_size // config.num_attention_heads}
    add_parts(model, elu_attention.ELU, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in attentions(model):
            module.learned.scale += torch.rand(module.learned.scale.shape, generator=generator)
            module.learned.shift += 0.5
    convert(model, CODE, settings)
    model.attach_attention()
    return model


def padded(row, side, length):
    fill = torch.zeros(length - len(row), dtype=torch.long)
    mask = torch.ones_like(row)
    parts = [(fill, row), (fill, mask)] if side == "left" else [(row, fill), (mask, fill)]
    return [torch.cat(part) for part in parts]


@pytest.mark.many
@pytest.mark.parametrize("make", [*DECODERS, tiny_bert])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_each_row_gives_alone(make, side):
    model, lengths = converted(make).base_model, (5, 13, 9)
    rows = [IDS[i, :n] for i, n in enumerate(lengths)]
    ids, mask = (torch.stack(part) for part in zip(*(padded(row, side, 13) for row in rows), strict=True))
    with torch.no_grad():
        # These features are not the same at other angles of a rotary embedding.
        together = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))[0]
        for row, out, kept in zip(rows, together, mask, strict=True):
            alone = model(input_ids=row[None])[0][0]
            torch.testing.assert_close(out[kept.bool()], alone, rtol=1e-4, atol=1e-5)


def test_a_row_of_padding_alone_is_finite_and_does_not_reach_the_others():
    model = converted(tiny_bert)
    mask = torch.ones_like(IDS)
    mask[1] = 0
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=mask)[0]
        rest = model(input_ids=IDS[[0, 2]])[0]
    assert out.isfinite().all()
    torch.testing.assert_close(out[[0, 2]], rest, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    model = converted(tiny_llama)
    places = torch.cat([torch.arange(5), torch.arange(8)])[None]
    with torch.no_grad():
        packed = model(IDS[:1], position_ids=places, use_cache=False)[0]
        apart = torch.cat([model(IDS[:1, :5])[0], model(IDS[:1, 5:])[0]], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", DECODERS)
def test_a_cache_continues_padded_rows(make):
    model = converted(make)
    rows = [padded(IDS[i, :n], "left", 9) for i, n in enumerate((4, 9, 7))]
    ids, mask = (torch.stack(part) for part in zip(*rows, strict=True))
    with torch.no_grad():
        expected = []
        for i, n in enumerate((4, 9, 7)):
            row = IDS[i : i + 1, :n]
            for _ in range(4):
                row = torch.cat([row, model(row, use_cache=False)[0][:, -1:].argmax(-1)], 1)
            expected.append(row[0, n:])
        found = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
        beams = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2, eos_token_id=None)
    assert torch.equal(found[:, 9:], torch.stack(expected))
    assert beams.shape == found.shape


def test_the_bytes_of_a_cache_do_not_grow():
    model, sizes = converted(tiny_llama), []
    with torch.no_grad():
        for length in (3, 11):
            cache = DynamicCache(config=model.config)
            model(IDS[:, :length], **{compat.CACHE: cache})
            assert all(isinstance(layer, StateLayer) for layer in cache.layers)
            assert cache.get_seq_length() == length
            sizes.append(sum(layer.nbytes() for layer in cache.layers))
    assert sizes[0] == sizes[1] > 0


def test_a_cache_is_not_continued_under_another_mask_nor_by_a_failed_forward():
    model = converted(tiny_llama)
    name, cache = compat.CACHE, DynamicCache(config=model.config)
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        model(IDS[:, :9], attention_mask=mask[:, :9], **{name: cache})
        with pytest.raises(ValueError, match="other tokens than the attention_mask says"):
            model(IDS[:, 9:10], attention_mask=torch.ones(3, 10, dtype=torch.long), **{name: cache})
        with pytest.raises(ValueError, match="did not reach the attention"):
            model(IDS[:, 9:10], attention_mask=mask[:, :10], **{name: cache})
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.layers[0].crop(-1)


def test_a_cache_is_not_continued_where_as_many_other_tokens_were_padding():
    model, cache = converted(tiny_llama), DynamicCache()
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, [0, 7]] = 0
    other = torch.ones_like(mask)
    other[0, [3, 4]] = 0
    with torch.no_grad():
        model(IDS[:, :9], attention_mask=mask[:, :9], **{compat.CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        mask, other = mask[[1, 0, 2]], other[[1, 0, 2]]
        with pytest.raises(ValueError, match="other tokens than the attention_mask says"):
            model(IDS[:, 9:10], attention_mask=other, **{compat.CACHE: copy.deepcopy(cache)})
        model(IDS[:, 9:10], attention_mask=mask, **{compat.CACHE: cache})
        model(IDS[:, 10:11], attention_mask=torch.cat([mask, mask[:, -1:]], 1), **{compat.CACHE: cache})


def test_a_cache_is_not_continued_by_a_model_with_other_settings():
    model, other, cache = converted(tiny_llama), converted(tiny_llama), DynamicCache()
    other.config.attention_pattern = {**other.config.attention_pattern, "note": 1}
    with torch.no_grad():
        model(IDS[:, :9], **{compat.CACHE: cache})
        with pytest.raises(ValueError, match="state of another attention"):
            other(IDS[:, 9:10], **{compat.CACHE: cache})


def test_a_state_is_offloaded_after_the_attention_has_read_it():
    moves, layer = [], StateLayer()

    class Moved(TensorState):
        def to(self, device):
            moves.append(str(device))
            return self

    part = torch.zeros(2, 1, 1, 4)
    layer.update(part, part)
    layer.keep(Moved(sums=part), "own", 1, (1, 1), (0, 0))
    layer.offload()
    layer.prefetch()
    assert moves == ["cpu", "cpu"]
    layer.update(part, part)
    layer.offload()  # as a cache that offloads does at once, before the attention reads what ``update`` returned
    assert len(moves) == 2
    layer.keep(Moved(sums=part), "own", 2, (2, 2), (0, 0))
    assert moves == ["cpu", "cpu", "cpu"]


def test_converted_models_are_copied_and_pickled():
    model = converted(tiny_llama).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(IDS, use_cache=True)[0], model(IDS)[0])
            cache = other(IDS, use_cache=True)[compat.CACHE]
        assert all(isinstance(layer, StateLayer) for layer in cache.layers)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_computes_as_before(in_place):
    model = converted(tiny_llama)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    given = [{"use_cache": False}, {"use_cache": True}, {"attention_mask": mask}]
    with torch.no_grad():
        expected = [model(IDS, **each)[0] for each in given]
        compiled = model
        if in_place:
            model.compile(backend="eager")
        else:
            compiled = torch.compile(model, backend="eager")
        for each, one in zip(given, expected, strict=True):
            assert torch.equal(compiled(IDS, **each)[0], one)
    torch.compiler.reset()


def test_caches_for_keys_weights_and_masks_of_pairs_are_refused():
    model = converted(tiny_llama)
    with pytest.raises(ValueError, match="cannot hold: leave cache_implementation out"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="no other masks"):
        model(IDS, attention_mask=torch.ones(3, 1, 13, 13, dtype=torch.bool), use_cache=False)


def test_a_checkpoint_runs_in_plain_transformers_and_lacks_nothing_in_silence(tmp_path, stock_python):
    model = converted(tiny_llama)
    with torch.no_grad():
        expected = model(IDS)[0]
    model.save_pretrained(tmp_path)
    torch.save((IDS, expected), tmp_path / "expected.pt")
    script = f"""
        import torch
        from transformers import AutoModelForCausalLM
        folder = {str(tmp_path)!r}
        ids, expected = torch.load(folder + "/expected.pt")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(model(ids)[0], expected)
        model.generate(ids, max_new_tokens=3)
    """
    done = stock_python.copy(textwrap.dedent(script))
    assert done.status == 0, done.err
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded(IDS)[0], expected)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["attention_pattern"]["head_width"] = "8"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="head_width"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_parts_that_a_checkpoint_lacks_are_initialized_by_themselves(tmp_path):
    from safetensors.torch import load_file, save_file

    converted(tiny_llama).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = [name for name in tensors if ".learned." in name and "layers.0" in name]
    assert len(lost) == 2
    save_file({k: v for k, v in tensors.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert {"model.layers.0.self_attn.learned.scale"} <= set(info["missing_keys"])
    first, second = (module.learned for module in attentions(found)[:2])
    assert torch.equal(first.scale, torch.ones_like(first.scale))
    assert torch.equal(first.shift, torch.ones_like(first.shift))
    assert float(second.shift) == 1.5


def test_the_trainer_trains_learned_parts(tmp_path):
    model = converted(tiny_llama)
    before = model.model.layers[0].self_attn.learned.scale.detach().clone()
    data = [{"input_ids": row, "labels": row} for row in IDS]
    settings = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2)
    Trainer(model, settings, train_dataset=data).train()
    assert not torch.equal(model.model.layers[0].self_attn.learned.scale, before)


def test_the_name_of_an_attachment_is_that_of_the_module_of_its_class():
    """Code that came with a checkpoint has a module of its own, and must not compute in the place of another."""
    names = []
    for module in ("code_of_one_version", "code_of_another"):
        kind = type("Own", (LearnedAttachment,), {"__module__": module})
        names += [kind("same").name, kind("same").name]
    assert names[0] == names[1] != names[2] == names[3]
    assert all(name.startswith("same_") for name in names)
