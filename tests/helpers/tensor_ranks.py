"""Run by ``test_parallelism`` as ranks of one process group (gloo): parts of packed layers beside the whole ones.

The folder ``HF_OPTIM_TENSOR_RANKS`` holds the checkpoints that the test has written.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import forked_ranks
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim.compressed.packed.packed_experts import PackedExperts
from hf_optim.compressed.packed.packed_linear import PackedLinear
from hf_optim.toolkit.distributed import agreement, liveness
from hf_optim.toolkit.distributed.tensor_parts import part_of

HOME = Path(os.environ.get("HF_OPTIM_TENSOR_RANKS", "."))
IDS = torch.arange(24).reshape(2, 12) % 60 + 3
BOUND = {torch.float32: 2e-6, torch.float64: 1e-12}


def load(name, world=2, **kwargs):
    kwargs = {"dtype": torch.float32, "optim_config": "auto", **kwargs}
    if world > 1:
        kwargs.setdefault("tp_plan", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(HOME / name, **kwargs)


def same(name, world, dtype=torch.float32):
    """Return what a part gives beside the whole: errors of logits, tokens, codes, and the share of the weights."""
    part, whole = load(name, world, dtype=dtype), load(name, 1, dtype=dtype)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad():
        ours, theirs = (m(IDS, attention_mask=mask).logits for m in (part, whole))
    error = float((ours - theirs)[mask.bool()].abs().max() / theirs.abs().max())
    inputs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = whole.generate(IDS, **inputs)
    found = [part.generate(IDS, **inputs), part.generate(IDS, custom_generate=hf_optim.generate, **inputs)]
    return {
        "error": error,
        "bound": BOUND[dtype],
        "tokens": [bool(torch.equal(tokens, each)) for each in found],
        "codes": codes_are_parts(part, whole),
        "share": bytes_of(part) / bytes_of(whole),
        "parts": sorted({str(p).partition(":")[0] for m in part.modules() if (p := part_of(m)) is not None}),
        "fused": sum(m.packing.group is not None for m in part.modules() if isinstance(m, PackedLinear)),
        "fused_whole": sum(m.packing.group is not None for m in whole.modules() if isinstance(m, PackedLinear)),
        "report": hf_optim.report(part).summary,
    }


def bytes_of(model):
    layers = [m for m in model.modules() if part_of(m) is not None or isinstance(m, (torch.nn.Linear, PackedExperts))]
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def codes_are_parts(part, whole):
    """Return True if each layer has the codes and scales of the whole one, bit for bit, cut where its part says."""
    for (_, mine), (_, theirs) in zip(part.named_modules(), whole.named_modules(), strict=True):
        if not isinstance(mine, PackedLinear) or not isinstance(theirs, PackedLinear):
            continue
        how, ours, all_of_it = part_of(mine), mine.codes(), theirs.codes()
        rows = how.span(theirs.out_features) if how.cuts_rows else slice(None)
        columns = how.span(theirs.in_features) if how.how == "columns" else slice(None)
        groups = (
            how.span(all_of_it.scale.shape[1]) if how.how == "columns" and all_of_it.scale.shape[1] > 1 else columns
        )
        groups = slice(None) if all_of_it.scale.shape[1] == 1 else groups
        if not torch.equal(ours.codes, all_of_it.codes[rows, columns]):
            return False
        if not torch.equal(ours.scale, all_of_it.scale[rows, groups]):
            return False
        if (ours.zero is None) != (all_of_it.zero is None):
            return False
        if ours.zero is not None and not torch.equal(ours.zero, all_of_it.zero[rows, groups]):
            return False
    return True


def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def w4a16(rank, world):
    return same("w4a16", world)


def w4a16_in_float64(rank, world):
    return same("w4a16", world, torch.float64)


def w4a16_with_zero_points_and_biases(rank, world):
    return same("biased", world)


def w8a8(rank, world):
    return same("w8a8", world)


def w8a8_static(rank, world):
    return same("static", world)


def float8(rank, world):
    return same("float8", world)


def act_order(rank, world):
    return same("ordered", world)


def act_order_with_scattered_groups(rank, world):
    return same("scattered", world)


def tied_embeddings(rank, world):
    return same("tied", world)


def mixtral(rank, world):
    return same("mixtral", world)


def qwen3_moe(rank, world):
    return same("qwen3_moe", world)


def checkpoints_of_other_tools(rank, world):
    """GPTQ and AWQ files of AutoRound, and those of llm-compressor, if the data of the tests are there."""
    folder = Path(os.environ.get("HF_OPTIM_TEST_DATA") or "../shared") / "checkpoints"
    names = ("auto_gptq", "auto_awq", "llmcompressor-w4a16_asym_g32", "llmcompressor-w8a8_smooth")
    return {name: same(folder / name, world) for name in names if (folder / name).is_dir()}


def gradients_of_inputs_are_those_of_one_rank(rank, world):
    found = []
    for model in (load("biased", world), load("biased", 1)):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        found.append(x.grad)
    return float((found[0] - found[1]).norm() / found[1].norm())


def a_setting_of_the_checkpoint_is_enough(rank, world):
    model = load("set", world, tp_plan=None) if world == 2 else None
    if model is None:
        return refusal(lambda: load("set", world, tp_plan=None))
    return hf_optim.report(model).rank


def a_recipe_of_this_step_alone_loads_the_part(rank, world):
    step = {"technique": "parallelism", "ranks": world}
    model = load("w4a16", world, tp_plan=None, optim_config=step)
    other = refusal(lambda: load("w4a16", world, tp_plan=None, optim_config={**step, "ranks": 8}))
    return [hf_optim.report(model).rank, other]


def dense_weights_are_cut_by_transformers(rank, world):
    step = {"technique": "parallelism", "ranks": world}
    part, whole = load("dense", world, tp_plan=None, optim_config=step), load("dense", 1)
    with torch.no_grad():
        ours, theirs = part(IDS).logits, whole(IDS).logits
    part.save_pretrained(HOME / f"gathered-{world}")  # by all ranks, which have the whole checkpoint afterwards
    saved = AutoModelForCausalLM.from_pretrained(HOME / f"gathered-{world}").state_dict()
    same = all(torch.equal(value, saved[key]) for key, value in whole.state_dict().items())
    return [float((ours - theirs).abs().max() / theirs.abs().max()), same]


def what_cannot_be_cut_is_refused(rank, world):
    model = load("w4a16", world)
    return {
        "save": refusal(lambda: model.save_pretrained(HOME / "never")),
        "save of the inner model": refusal(lambda: model.model.save_pretrained(HOME / "never")),
        "save of the class": refusal(lambda: type(model).save_pretrained(model, HOME / "never")),
        "rule": refusal(lambda: load("w4a16", world, tp_plan={"model.layers.*.mlp.dwn_proj": "replicated"})),
        "no plan": refusal(lambda: load("gpt2", world)),
        "heads": refusal(lambda: load("heads", world)),
        "experts": refusal(lambda: load("experts", world)),
        "odd": refusal(lambda: load("odd", world)),
        "style": refusal(lambda: load("w4a16", world, tp_plan={"model.layers.*.mlp.up_proj": "diagonal"})),
        "fsdp": refusal(lambda: load("w4a16", world, distributed_config={"fsdp_size": 2}, tp_plan=None)),
        "size": refusal(lambda: load("w4a16", world, tp_size=world + 1)),
        "device_map": refusal(lambda: load("w4a16", world, device_map={"model": "cpu", "lm_head": "disk"})),
        "capacity": refusal(lambda: load("capacity", world)),
    }


def a_rank_with_another_recipe_is_named(rank, world):
    plan = {"lm_head": "replicated"} if rank == world - 1 else "auto"
    return refusal(lambda: load("w4a16", world, tp_plan=plan))


def a_rank_with_another_version_is_named(rank, world):
    former = agreement.PACKAGES
    if rank == world - 1:
        agreement.PACKAGES = former[:-1]
    try:
        return refusal(lambda: agreement.require_agreement({"versions": agreement.versions()}))
    finally:
        agreement.PACKAGES = former


def a_rank_that_dies_is_named(rank, world):
    """The last check: one rank ends in the middle of a generation."""
    liveness.watch_ranks(2.0)
    model = load("set", world, tp_plan="auto")
    liveness.watch_ranks(2.0)
    if rank == world - 1:
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: os._exit(9))
        assert handle
    dist.barrier()
    start = time.monotonic()
    error = refusal(lambda: model.generate(IDS, max_new_tokens=4, pad_token_id=0))
    return [error, time.monotonic() - start]


CHECKS = [
    w4a16,
    w8a8,
    mixtral,
    a_rank_with_another_recipe_is_named,
    a_rank_with_another_version_is_named,
    a_setting_of_the_checkpoint_is_enough,
    a_recipe_of_this_step_alone_loads_the_part,
]
MORE = [
    w4a16_in_float64,
    w4a16_with_zero_points_and_biases,
    w8a8_static,
    float8,
    act_order,
    act_order_with_scattered_groups,
    tied_embeddings,
    qwen3_moe,
    checkpoints_of_other_tools,
    gradients_of_inputs_are_those_of_one_rank,
    dense_weights_are_cut_by_transformers,
]

if __name__ == "__main__":
    chosen = {2: [*CHECKS, a_rank_that_dies_is_named]}
    if os.environ.get("HF_OPTIM_TENSOR_MORE"):
        two = [*MORE, what_cannot_be_cut_is_refused, a_rank_that_dies_is_named]
        chosen = {2: two, 4: [*CHECKS, *MORE, a_rank_that_dies_is_named]}
    raise SystemExit(forked_ranks.main({world: {c.__name__: c for c in checks} for world, checks in chosen.items()}))
