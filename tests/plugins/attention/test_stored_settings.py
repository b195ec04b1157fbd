"""Settings of a pattern in a configuration file: none may be missing, longer than the model, or change unseen."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2
from transformers import AlbertConfig, AlbertModel

import hf_optim

STEPS = {
    "axial": {"columns": 4},
    "big_bird": {"block": 4, "random": 1, "global_first": 1},
    "blockwise": {"block": 8},
    "compressed": {"stride": 3},
    "dilated": {"window": 3, "dilation": [1, 2], "by": "layer"},
    "etc": {"radius": 2},
    "longformer": {"window": 4, "dilations": [1, 2], "global_projections": True},
    "sparse_transformer": {"stride": 6, "vertices": 2},
    "strided": {"stride": 5},
}
IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))


def converted(name, build=tiny_bert, **fields):
    return hf_optim.optimize(build(), [{"technique": name, **STEPS[name], **fields}])


def made_of(model, **changes):
    """Return a model of the class of ``model`` whose settings are changed; None removes one."""
    config = copy.deepcopy(model.config)
    config.attention_pattern = {**config.attention_pattern, **changes}
    for setting in [key for key, value in changes.items() if value is None]:
        del config.attention_pattern[setting]
    with torch.device("meta"):
        return type(model)(config)


@pytest.mark.parametrize("name", STEPS)
def test_a_setting_that_was_removed_is_named(name):
    model = converted(name)
    for setting in model.config.attention_pattern:
        with pytest.raises(ValueError, match=rf"lacks {setting}: it was removed") as caught:
            made_of(model, **{setting: None})
        assert "trust_remote_code=True loads" in str(caught.value)
    made_of(model)


def test_every_setting_of_global_tokens_is_written():
    tokens = {"global_first", "global_last", "global_positions", "global_token_ids", "global_projections"}
    assert converted("etc", global_first=0).config.attention_pattern.keys() == {
        "radius", "g2g", "g2l", "l2g", "l2l", "hard_g2l", *tokens,
    }  # fmt: skip
    assert converted("big_bird").config.attention_pattern.keys() == {
        "block", "random", "choice", "seed", "by_head", *tokens,
    }  # fmt: skip
    found = hf_optim.optimize(tiny_bert(), [{"technique": "longformer", "window": 4}]).config.attention_pattern
    assert found.keys() == {"windows", "dilations", "dilated_heads", *tokens}


@pytest.mark.parametrize(
    ("name", "setting", "values"),
    [("longformer", "windows", [4] * 3), ("longformer", "dilations", [1, 2, 2]), ("dilated", "dilation", [1, 2, 3])],
)
def test_lists_by_layer_are_as_long_as_the_model(name, setting, values):
    with pytest.raises(ValueError, match=f"has 3 {setting}, and the model 2 layers"):
        made_of(converted(name), **{setting: values})


def test_equal_entries_by_layer_are_stored_once():
    """So that a layer can be removed from the model."""
    model = hf_optim.optimize(
        tiny_gpt2(),
        [{"technique": "longformer", "window": 4, "dilations": [2, 2]}, {"technique": "distilbert", "layers": [1]}],
    )
    assert model.config.attention_pattern["dilations"] == [2]
    made_of(model)


def test_global_projections_that_are_switched_off_are_not_lost_unseen(tmp_path):
    model = converted("longformer")
    assert any("query_global" in name for name in model.state_dict())
    config = copy.deepcopy(model.config)
    del config.attention_pattern["global_projections"]
    with pytest.raises(ValueError, match="lacks global_projections"):
        type(model)(config)


def test_without_random_blocks_layers_may_share_their_attention():
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    for fields in ({"random": 0}, {"random": 0, "by_head": True, "seed": 3}):
        model = hf_optim.optimize(AlbertModel(config).eval(), [{"technique": "big_bird", "block": 4, **fields}])
        with torch.no_grad():
            assert model(IDS)[0].isfinite().all()
    shorter = hf_optim.optimize(
        tiny_bert(),
        [{"technique": "big_bird", "block": 4, "random": 0}, {"technique": "distilbert", "layers": [1]}],
    )
    assert shorter.config.num_hidden_layers == 1


def test_projections_of_global_tokens_get_no_other_rows():
    """What observes inputs of layers counts real tokens: rows of the batch have one, three and no global tokens."""
    model = converted("longformer", dilations=[], global_first=0)
    marks = torch.zeros(3, 24, dtype=torch.long)
    marks[0, 5] = marks[1, 3] = marks[1, 7] = marks[1, 20] = 1
    ids, seen = torch.cat([IDS, IDS[:1]]), []
    modules = [m for m in model.modules() if hasattr(m, "query_global")]
    hooks = [m.query_global.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:-1])) for m in modules]
    with torch.no_grad():
        found = model(ids, global_attention_mask=marks).logits
        alone = [model(ids[row : row + 1], global_attention_mask=marks[row : row + 1]).logits for row in range(3)]
    for hook in hooks:
        hook.remove()
    assert [tuple(shape) for shape in seen[:2]] == [(4,), (4,)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


def test_compressed_attention_refuses_to_return_weights():
    model = converted("compressed")
    with pytest.raises(ValueError, match="does not form weights"):
        model(IDS, output_attentions=True)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("4", "block='4', not a whole number"),
        (0, "block=0, not a whole number"),
        (None, "lacks block"),
        (True, "block=True, not"),
        (1.5, "block=1.5, not"),
        ([4], "block of the type list, not"),
        (10**50, "block of 167 bits, not"),
        ("\x1b[31m" + "x" * 90, r"block='\\x1b\[31mx{35}', not"),
    ],
)
def test_messages_show_what_is_there(value, shown):
    model = converted("blockwise")
    with pytest.raises(ValueError, match=re.compile(shown)):
        made_of(model, block=value)
