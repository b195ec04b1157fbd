"""``parallelism``: parts of packed layers on real ranks (gloo), what is refused, the record, and the setting.

What the ranks do is in ``helpers/tensor_ranks.py``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from python_session import PythonSession
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen2
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_optim
from hf_optim import CheckpointError, ModelError, OptimConfig, RecipeError, run_of
from hf_optim.lifecycle.tensor_parallel import refuse_save, requested
from hf_optim.toolkit.distributed import RankSetting, liveness, rank_setting_of, set_rank_setting, tensor_plan
from hf_optim.toolkit.distributed.tensor_parts import Part

SCRIPT = Path(__file__).parents[2] / "helpers" / "tensor_ranks.py"
STEP = {"technique": "parallelism", "ranks": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
W4 = {"technique": "rtn", "bits": 4, "group_size": 16}


def write(home: Path, name: str, model, *steps, **kwargs) -> None:
    hf_optim.optimize(model, list(steps), **kwargs).save_pretrained(home / name)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """Return a folder with the checkpoints of ``two``."""
    home = tmp_path_factory.mktemp("tensor_ranks")
    write(home, "w4a16", tiny_llama(**WIDE), W4)
    write(home, "w8a8", tiny_llama(**WIDE), {"technique": "rtn", "scheme": "W8A8"})
    write(home, "mixtral", tiny_mixtral(**WIDE), W4)
    shutil.copytree(home / "w4a16", home / "set")
    change(home / "set", hf_optim_parallelism={"ranks": 2, "timeout": 30.0})
    return home


@pytest.fixture(scope="session")
def checkpoints(few):
    """Return a folder with a checkpoint for each check."""
    home = few
    data = {"calibration": [{"input_ids": torch.arange(48).reshape(4, 12) % 60}]}
    biased = {**WIDE, "attention_bias": True, "mlp_bias": True}
    write(home, "biased", with_biases(tiny_llama(**biased)), {**W4, "symmetric": False})
    static = {"technique": "rtn", "bits": 8, "activations": "int8", "dynamic": False}
    write(home, "static", tiny_llama(**WIDE), static, **data)
    write(home, "float8", tiny_llama(**WIDE), {"technique": "rtn", "scheme": "FP8_DYNAMIC"})
    ordered = {"technique": "gptq", "bits": 4, "group_size": 16, "act_order": True}
    write(home, "ordered", tiny_llama(**WIDE), ordered, **data)
    scatter(home / "ordered", home / "scattered")
    write(home, "tied", tiny_qwen2(**WIDE), W4)
    config = Qwen3MoeConfig(
        **WIDE, vocab_size=64, num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(1)
    write(home, "qwen3_moe", Qwen3MoeForCausalLM(config).eval(), W4)
    write(home, "gpt2", tiny_gpt2(), {"technique": "magnitude"})
    source = json.loads((home / "w4a16" / "config.json").read_text())
    change(home / "gpt2", quantization_config=source["quantization_config"])
    write(home, "heads", tiny_llama(**{**WIDE, "num_key_value_heads": 1}), W4)
    write(home, "experts", tiny_mixtral(**WIDE, num_local_experts=3), W4)
    write(home, "odd", tiny_llama(**{**WIDE, "intermediate_size": 129}), {"technique": "rtn", "bits": 8})
    capacity = {"technique": "capacity_routing", "capacity": 2.0, "measure": False}
    write(home, "capacity", tiny_mixtral(**WIDE), capacity, W4)
    tiny_llama(**WIDE).save_pretrained(home / "dense")
    return home


def scatter(source: Path, target: Path) -> None:
    """Copy a checkpoint, with the columns of each group anywhere among the columns, and an index that says where."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith("weight_scale")]:
        columns = tensors[key].shape[1] * 16
        groups = torch.arange(columns) // 16
        tensors[key.replace("scale", "g_idx")] = groups[torch.randperm(columns, generator=generator)].int()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["actorder"] = "group"
    (target / "config.json").write_text(json.dumps(config))


def change(folder: Path, **entries) -> None:
    """Write entries into ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def with_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def run_ranks(python: PythonSession, home: Path, world: int, more: bool = False) -> dict:
    environment = {"HF_OPTIM_TENSOR_RANKS": str(home), "HF_OPTIM_TENSOR_MORE": "1" if more else ""}
    output = home / f"found{'-more' if more else ''}"
    done = python.script(SCRIPT, output, world, **environment)
    assert done.status == 0, done.err[-3000:]
    return json.loads(Path(f"{output}-{world}.json").read_text())


def require_same(found: list[dict], ranks: int) -> None:
    """Each rank has the tokens of one rank, its logits up to the order of summation, and the codes of its part."""
    assert len(found) == ranks
    for one in found:
        assert "found" in one, one
        result = one["found"]
        assert result["error"] <= result["bound"], result
        assert result["tokens"] == [True, True]
        assert result["codes"]
        assert result["share"] < 0.8
        assert result["fused"] == result["fused_whole"]


@pytest.fixture(scope="session")
def two(python, few):
    return run_ranks(python, few, 2)


@pytest.fixture(scope="session")
def more_of_two(python, checkpoints):
    return run_ranks(python, checkpoints, 2, more=True)


@pytest.fixture(scope="session")
def four(python, checkpoints):
    return run_ranks(python, checkpoints, 4, more=True)


@pytest.mark.parametrize("name", ["w4a16", "w8a8", "mixtral"])
def test_two_ranks_give_what_one_gives(name, two):
    require_same(two[name], 2)


def test_each_rank_has_half_of_each_layer_and_the_report_says_so(two):
    first, second = (one["found"] for one in two["w4a16"])
    assert first["parts"] == ["columns", "rows"]
    assert 0.45 < first["share"] < 0.55
    assert first["report"].startswith("rank 0 of 2: 11 by rows, 4 by columns")
    assert second["report"].startswith("rank 1 of 2")
    mixture = two["mixtral"][0]["found"]
    assert mixture["parts"] == ["columns", "experts", "rows"]
    assert 0.45 < mixture["share"] < 0.55


def test_inputs_with_a_scale_for_each_token_are_gathered_so_that_outputs_are_equal_to_the_bit(two):
    found = [one["found"] for one in two["w8a8"]]
    assert all(one["error"] == 0.0 for one in found)
    assert found[0]["parts"] == ["rows", "rows, input gathered"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("save", "CheckpointError: this rank has a part of the model"),
        ("save of the inner model", "CheckpointError: this rank has a part of the model"),
        ("save of the class", "CheckpointError: this rank has a part of the model"),
        ("rule", "tp_plan names 'model.layers.*.mlp.dwn_proj', and LlamaForCausalLM has no such module"),
        ("no plan", "ModelError: transformers has no tensor parallel plan for GPT2LMHeadModel"),
        ("heads", "ModelError: llama has 1 key/value heads, which 2 ranks cannot divide evenly"),
        ("experts", "has 3 experts, which 2 ranks cannot divide evenly"),
        ("odd", "gate_proj cannot be cut into 2 parts by rows: 129 output channels do not divide"),
        ("style", "has the style 'diagonal' for model.layers.*.mlp.up_proj"),
        ("fsdp", "distributed_config: fsdp_size is 2"),
        ("size", "packed layers are cut for all 2 ranks, not for groups of 3"),
        ("device_map", "a rank has one device"),
        ("capacity", "config.json states a capacity of the experts"),
    ],
)
def test_what_cannot_be_cut_is_refused_on_every_rank(name, text, more_of_two):
    for one in more_of_two["what_cannot_be_cut_is_refused"]:
        assert text in one["found"][name], one


def test_ranks_that_load_something_else_are_named(two):
    for one in two["a_rank_with_another_recipe_is_named"]:
        assert one["found"].startswith("RankError: rank 1 and rank 0 have different recipe")
    for one in two["a_rank_with_another_version_is_named"]:
        assert one["found"].startswith("RankError: rank 1 and rank 0 have different versions")


def test_setting_and_step_load_parts_too(two):
    assert [one["found"] for one in two["a_setting_of_the_checkpoint_is_enough"]] == ["rank 0 of 2", "rank 1 of 2"]
    for number, one in enumerate(two["a_recipe_of_this_step_alone_loads_the_part"]):
        assert one["found"][0] == f"rank {number} of 2"
        assert "ranks is 8, and 2 ranks were started" in one["found"][1]


def test_a_rank_that_dies_ends_the_others_with_its_name_in_time(two):
    error, seconds = two["a_rank_that_dies_is_named"][0]["found"]
    assert error.startswith("RankError: rank 1 of 2 has ended: it gave no sign for")
    assert seconds < 15
    assert "error" in two["a_rank_that_dies_is_named"][1]


KINDS = [
    "w4a16_in_float64",
    "w4a16_with_zero_points_and_biases",
    "w8a8_static",
    "float8",
    "act_order",
    "act_order_with_scattered_groups",
    "tied_embeddings",
    "qwen3_moe",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_with_more_kinds_of_weights(name, more_of_two):
    require_same(more_of_two[name], 2)


@pytest.mark.slow
def test_checkpoints_of_other_tools(more_of_two, four):
    """Their 352 channels are 11 groups, which no two ranks divide: such layers are cut by rows."""
    for checks, world in ((more_of_two, 2), (four, 4)):
        for one in checks["checkpoints_of_other_tools"]:
            assert "found" in one, one
            for found in one["found"].values():
                require_same([{"found": found}], 1)
                assert "rows, input gathered" in found["parts"], world


STOPPED = """
import os, signal, sys, torch
import torch.distributed as dist
from hf_optim.toolkit.distributed import liveness
from hf_optim.toolkit.distributed.tensor_parts import sum_over_ranks
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[1]), world_size=2)
liveness.watch_ranks(2.0)
sum_over_ranks(torch.ones(1))
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
sum_over_ranks(torch.ones(1))
"""


@pytest.mark.slow
def test_a_rank_that_hangs_with_its_host_ends_the_others(tmp_path):
    """A stopped process closes no connection: the other one's main thread waits for ever, and the process is ended."""
    store = f"file://{tmp_path}/store"
    ranks = [
        subprocess.Popen([sys.executable, "-c", STOPPED, str(rank), store], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        _, error = ranks[0].communicate(timeout=120)
    finally:
        for each in ranks:
            each.kill()
            each.wait()
        ranks[1].stderr.close()
    assert ranks[0].returncode == liveness.EXIT_STATUS
    assert "rank 1 of 2 has ended: it gave no sign for" in error


LEAVES = """
import sys, time, torch
import torch.distributed as dist
from pathlib import Path
from hf_optim.toolkit.distributed import liveness
from hf_optim.toolkit.distributed.tensor_parts import sum_over_ranks
rank, port = int(sys.argv[1]), Path(sys.argv[2])
if rank:
    while not port.exists():
        time.sleep(0.05)
store = dist.TCPStore("127.0.0.1", int(port.read_text()) if rank else 0, 2, is_master=not rank, wait_for_workers=False)
if not rank:
    port.with_suffix(".new").write_text(str(store.port))
    port.with_suffix(".new").rename(port)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
liveness.watch_ranks(2.0)
sum_over_ranks(torch.ones(1))
if rank:
    time.sleep(6)
    print("its own work is done")
"""


@pytest.mark.slow
def test_a_rank_goes_on_alone_when_the_one_that_keeps_the_store_ends_in_order(tmp_path):
    command = [sys.executable, "-c", LEAVES]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "port")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for rank in (0, 1)
    ]
    try:
        found = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "its own work is done" in found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4a16", "w8a8", "mixtral", *KINDS])
def test_four_ranks_give_what_one_gives(name, four):
    require_same(four[name], 4)


def require_more(checks: dict, world: int) -> None:
    """Gradients are those of one rank, transformers cuts dense weights, and a rank that dies is named."""
    for one in checks["gradients_of_inputs_are_those_of_one_rank"]:
        assert one["found"] < 2e-6
    for one in checks["dense_weights_are_cut_by_transformers"]:
        error, saved = one["found"]
        assert error < 2e-6
        assert saved
    for error, seconds in (one["found"] for one in checks["a_rank_that_dies_is_named"][:-1]):
        assert f"rank {world - 1} of {world} has ended" in error
        assert seconds < 15


@pytest.mark.slow
def test_more_of_what_two_ranks_do(more_of_two):
    require_more(more_of_two, 2)


@pytest.mark.slow
def test_more_of_what_four_ranks_do(four):
    require_more(four, 4)
    for one in four["a_setting_of_the_checkpoint_is_enough"]:
        assert "says 2 ranks, and there are 4" in one["found"]


# -- one process ------------------------------------------------------------------------------------------------------
def test_the_step_changes_no_weight_and_stores_its_setting(tmp_path):
    model = tiny_llama(**WIDE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = hf_optim.optimize(model, [W4, STEP])
    (_, step) = run_of(optimized).recipe.steps
    reported = run_of(optimized).reported(step)
    assert reported["layers_cut"] == 15
    assert reported["weights_on_a_rank"] * 2 == reported["weights"]
    optimized.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hf_optim_parallelism"] == {"ranks": 2, "timeout": 30.0}
    again = type(model).from_pretrained(tmp_path, optim_config="auto")
    assert rank_setting_of(again.config) == RankSetting(2, 30.0)
    assert again.state_dict().keys() >= {"model.embed_tokens.weight"}
    assert torch.equal(before["model.embed_tokens.weight"], again.model.embed_tokens.weight)
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "gives each of 2 ranks a part of 15 linear layers" in card


@pytest.mark.parametrize(
    ("model", "fields", "text"),
    [
        (tiny_gpt2, {}, "has no tensor parallel plan for GPT2LMHeadModel"),
        (tiny_bert, {}, "has no tensor parallel plan for BertForSequenceClassification"),
        (tiny_llama, {"ranks": 4}, r"llama has 2 key/value heads, which 4 ranks cannot divide evenly .*use 2 ranks"),
        (tiny_mixtral, {"ranks": 3}, "attention heads, which 3 ranks cannot divide"),
    ],
)
def test_models_that_cannot_be_divided_are_refused_before_any_work(model, fields, text):
    with pytest.raises(ModelError, match=text):
        hf_optim.optimize(model(), STEP | fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"ranks": 0}, "ranks must be >= 1"), ({"ranks": 2.5}, "ranks"), ({"timeout": 0.5}, "timeout must be >= 2")],
)
def test_wrong_fields(fields, text):
    with pytest.raises(RecipeError, match=text):
        OptimConfig.parse([STEP | fields])


@pytest.mark.parametrize(
    "entry", [3, {}, {"ranks": 2}, {"ranks": 2, "timeout": 30.0, "mode": 1}, {"ranks": True, "timeout": 30.0}]
)
def test_a_damaged_setting_is_refused(entry):
    config = tiny_llama().config
    config.hf_optim_parallelism = entry
    with pytest.raises(ModelError, match="hf_optim_parallelism in the configuration"):
        rank_setting_of(config)


def test_without_a_launcher_a_plan_is_refused_and_a_setting_is_not(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    config = tiny_llama().config
    with pytest.raises(ModelError, match=r"RANK, WORLD_SIZE, .* is not set: start the script with `torchrun"):
        requested({"tp_plan": "auto"}, config, packed=True)
    set_rank_setting(config, RankSetting(2, 30.0))
    assert requested({}, config, packed=True) is None
    kept = {"tp_plan": "auto"}
    assert requested(kept, config, packed=False) is None
    assert kept == {"tp_plan": "auto"}  # transformers cuts floating-point weights


def test_a_part_says_what_it_is():
    part = Part("gathered", 1, 4, "act-order")
    assert part.local_shape((64, 32)) == (16, 32)
    assert part.span(64) == slice(16, 32)
    assert str(part) == "rows, input gathered: part 2 of 4 (act-order)"
    assert Part("columns", 0, 2).local_shape((64, 32)) == (64, 16)
    with pytest.raises(CheckpointError, match="a part of the model"):
        refuse_save("somewhere")


def test_rules_of_a_call_replace_those_of_the_plan():
    model = tiny_llama()
    plan = tensor_plan.plan_of(model, {"lm_head": "replicated"})
    assert tensor_plan.style_of("lm_head", plan) == "replicated"
    assert tensor_plan.style_of("model.layers.1.mlp.down_proj", plan) == "rowwise"
    with pytest.raises(ModelError, match='pass "auto", or a mapping'):
        tensor_plan.plan_of(model, "everything")


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"mlp.up_proj": "replicated"}, r"leaves up_proj of model.layers.0.mlp whole and cuts gate_proj, down_proj"),
        ({"self_attn.q_proj": "replicated", "self_attn.o_proj": "replicated"}, r"cuts k_proj, v_proj, whose widths"),
        ({"self_attn.v_proj": "colwise_gather_output"}, r"leaves v_proj of model.layers.0.self_attn whole"),
        ({"mlp.down_proj": "colwise"}, r"gives model.layers.0.mlp.down_proj the style colwise, and the plan"),
    ],
)
def test_rules_that_do_not_fit_together_are_refused(rules, reason):
    model, prefix = tiny_llama(), "model.layers.*."
    with pytest.raises(ModelError, match=reason):
        tensor_plan.require_fitting_rules(model, {prefix + name: style for name, style in rules.items()})
    one = {f"model.layers.1.{name}": style for name, style in rules.items()}
    with pytest.raises(ModelError, match=reason.replace("layers.0", "layers.1")):
        tensor_plan.require_fitting_rules(model, one)


def test_rules_that_fit_together():
    for names in (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")):
        parent = "self_attn" if "q_proj" in names else "mlp"
        for number in "*1":
            given = {f"model.layers.{number}.{parent}.{name}": "replicated" for name in names}
            tensor_plan.require_fitting_rules(tiny_llama(), given)
    tensor_plan.require_fitting_rules(tiny_llama(), {"lm_head": "replicated"})
    tensor_plan.require_fitting_rules(tiny_llama(), "auto")
