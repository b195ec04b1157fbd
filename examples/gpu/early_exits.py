"""Early exits on a GPU: equal outputs in float16 and float32, training in float16, and the time that exits save.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/early_exits.py [WORD ...]

Weights are random. ``check`` raises where an exit is not what it has to be; ``training`` runs ``depth_adaptive`` with
float16 and a loss scale; ``times`` has tokens that are all made to leave, and drafts that are all accepted, in a
decoder of 24 blocks of 2,048 channels. ``halting`` is the update of a step of ``act`` (adaptive computation time)
besides its block, in one launch beside plain PyTorch: first compared with float64, then timed. ``TINY=1`` runs all in
small on a CPU.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from typing import Any

import torch
from sections import Sections
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import hf_optim
from hf_optim_kernels.common import benchmark
from hf_optim_plugins.adaptive import _halting, _halting_kernel

TINY = bool(os.environ.get("TINY"))
DEVICE = "cpu" if TINY else "cuda"
section = Sections("early-exits-h200.json")
Exit = hf_optim.early_exit.EarlyExit


def decoder(layers: int, width: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=width, intermediate_size=3 * width, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, num_hidden_layers=layers, vocab_size=2048, dtype=dtype,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@section("check")
@torch.no_grad()
def check() -> dict[str, Any]:
    """Exits beside the whole model, batches beside rows alone, lossless tokens beside greedy ones."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16):
        model, name = decoder(6, 256, dtype), str(dtype).removeprefix("torch.")
        ids = torch.randint(1, 2000, (4, 24), device=DEVICE)
        exits = hf_optim.attach_exits(model, hf_optim.ExitSettings(layers=(1, 3)))
        last = hf_optim.run_to_exit(model, 2, input_ids=ids).output.logits
        assert torch.equal(last, model(input_ids=ids).logits), f"{name}: the last exit is not the model"
        first = hf_optim.run_to_exit(model, 0, input_ids=ids)
        assert torch.equal(exits.logits(0, first.hidden), first.output.logits), f"{name}: an exit is not its state's"
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
        greedy = model.generate(input_ids=ids, **given)
        never = hf_optim.generate(model, input_ids=ids, **given, early_exit=Exit(threshold=1.5, layers=(1, 3)))
        lossless = Exit(lossless=True, layers=(3,), drafts=3)
        drafted = model.generate(input_ids=ids, **given, custom_generate=hf_optim.early_exit.custom(lossless))
        gap = first.output.logits[:, -1].float().softmax(-1).topk(2).values
        level = float((gap[:, 0] - gap[:, 1]).median())
        mixed = Exit(threshold=level, layers=(1, 3))
        more = {"return_dict_in_generate": True, "early_exit": mixed}
        batch = hf_optim.generate(model, input_ids=ids, **given, **more)
        rows = [
            hf_optim.generate(
                model, input_ids=row[None], **{**given, "attention_mask": torch.ones_like(row[None])}, **more
            )
            for row in ids
        ]
        alone = torch.cat([row.sequences for row in rows])
        share = lambda a, b: float((a[:, 24:] == b[:, 24:]).float().mean())  # noqa: E731
        found[name] = {
            "never leaving": share(never, greedy), "lossless": share(drafted, greedy),
            "batch and rows": share(batch.sequences, alone), "layers": float(batch.layers.float().mean()),
            "layers of rows": float(torch.cat([row.layers for row in rows]).float().mean()),
        }  # fmt: skip
        if dtype == torch.float32:
            assert found[name]["never leaving"] == found[name]["lossless"] == 1.0, f"{found}: other tokens"
        print(name, found[name], flush=True)
    return found


@section("training")
def training() -> dict[str, Any]:
    """depth_adaptive with float16 and a loss scale; the exits are stored and come back."""
    model = decoder(4, 256, torch.float32).train()
    step = {"technique": "depth_adaptive", "heads": "own", "classifier": "sequence"}
    rows = [{"input_ids": (ids := torch.randint(1, 200, (32,)).tolist()), "labels": ids} for _ in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=20, per_device_train_batch_size=8, learning_rate=1e-3, fp16=not TINY, report_to=[],
            logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=TINY,
        )  # fmt: skip
        model = hf_optim.optimize(model, step)
        trainer = hf_optim.OptimTrainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert all(loss == loss for loss in losses), f"a loss is NaN: {losses}"
        assert losses[-1] < losses[0], f"nothing is learned: {losses}"
        # Under float16 the forward of the trained model is one of mixed precision.
        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
        trained.save_pretrained(f"{folder}/model")
        load = lambda dtype: AutoModelForCausalLM.from_pretrained(f"{folder}/model", optim_config="auto", dtype=dtype)  # noqa: E731
        again, half = load(torch.float32).to(DEVICE), load(torch.float16).to(DEVICE)
        ids = torch.randint(1, 200, (2, 16), device=DEVICE)
        with torch.no_grad():
            for index in range(4):
                outputs = [hf_optim.run_to_exit(m, index, input_ids=ids).output.logits for m in (trained, again, half)]
                assert torch.equal(*outputs[:2]), f"exit {index} differs after it was stored"
                assert outputs[2].isfinite().all()
                assert (outputs[2].float() - outputs[0]).norm() < 0.01 * outputs[0].norm(), f"exit {index} in float16"
            out = hf_optim.forward_with_exits(half, threshold=0.05, input_ids=ids)
    print(losses[0], losses[-1], out.mean_layers(), flush=True)
    return {"first_loss": losses[0], "last_loss": losses[-1], "layers": float(out.mean_layers())}


@section("times")
@torch.no_grad()
def times() -> dict[str, Any]:
    """Milliseconds of a token: transformers' loop, tokens that all leave, and drafts that are all accepted."""
    model = decoder(4, 64, torch.float32) if TINY else decoder(24, 2048, torch.bfloat16)
    count, depth = 8 if TINY else 20, model.config.num_hidden_layers
    ids = torch.randint(1, 2000, (1, 32), device=DEVICE)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}

    def timed(call: Any) -> float:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            call(input_ids=ids, **given)
            if not TINY:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return 1000 * min(seconds[1:]) / count

    def exiting(settings: Any) -> Any:
        return lambda **more: hf_optim.generate(model, early_exit=settings, **more)

    result = {"transformers": timed(model.generate)}
    for share in (4, 2):
        layer = depth // share - 1
        result[f"leave after {layer + 1} of {depth}"] = timed(exiting(Exit(threshold=0.0, layers=(layer,))))
    for block in model.model.layers[depth // 4 :]:  # blocks that add nothing: every draft is accepted
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    for drafts in (3, 7):
        settings = Exit(lossless=True, layers=(depth // 4 - 1,), drafts=drafts)
        result[f"{drafts} drafts after {depth // 4} of {depth}"] = timed(exiting(settings))
    result["captured at full depth"] = timed(lambda **more: hf_optim.generate(model, **more))
    print({name: round(ms, 3) for name, ms in result.items()}, flush=True)
    return result


def halting_case(tokens: int, width: int, dtype: torch.dtype, mix: str, reads: str) -> tuple[Any, Any, list[Any], Any]:
    """Return a halting unit, what three steps left, the states and inputs of four more, and slopes of the results."""
    draw = torch.Generator(DEVICE).manual_seed(tokens + width)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    rule = _halting.Rule(8, 0.01, mix, "copied", reads, 0.0)

    def normal(*shape: int) -> torch.Tensor:
        rounded = torch.randn(*shape, device=DEVICE, generator=draw).to(torch.bfloat16)
        return rounded.to(dtype).requires_grad_()

    steps = [(normal(1, tokens, width), normal(1, tokens, width) if reads == "before" else None) for _ in range(4)]
    unit = _halting.HaltingUnit(width, -1.5, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        unit.weight.copy_((normal(width) / width**0.5).to(torch.bfloat16))
    begin = _halting.Progress(steps[0][0], None, rule)
    begin.total = (torch.rand(1, tokens, device=DEVICE, generator=draw) * 0.6).to(kind).requires_grad_()
    begin.running = torch.rand(1, tokens, device=DEVICE, generator=draw) < 0.8
    begin.output = normal(1, tokens, width).detach().to(kind).requires_grad_()
    begin.remainder = torch.zeros_like(begin.total).requires_grad_()
    return unit, begin, steps, [normal(1, tokens, width).detach().to(kind), begin.total.detach().flip(1)]


def pondered(unit: Any, begin: Any, steps: list[Any], last: bool) -> Any:
    """Return what tokens are after some steps; ``begin`` stays what it is."""
    own = copy.copy(begin)
    for number, (state, read) in enumerate(steps, 1):
        unit(state if read is None else read, own, state, last and number == len(steps))
    return own


def slopes(unit: Any, begin: Any, steps: list[Any], upstream: Any, last: bool) -> tuple[Any, list[torch.Tensor]]:
    """Return what tokens are after some steps, and all gradients, those of the unit in one."""
    own = pondered(unit, begin, steps, last)
    leaves = [part for pair in steps for part in pair if part is not None]
    leaves += [unit.weight, unit.bias, begin.total, begin.output, begin.remainder]
    results, ups = (own.output, own.remainder, own.total), (*upstream, upstream[1])
    grads = list(torch.autograd.grad(results, leaves, ups))
    # The gradient of the bias is a sum of thousands of numbers of both signs, rounded after each step.
    grads[-5:-3] = [torch.cat([grads[-5], grads[-4][None]])]
    return own, grads


@section("halting")
def halting() -> dict[str, Any]:
    """Four steps against float64, equal bits twice; then microseconds of one step, eager and replayed from a graph."""
    found: dict[str, Any] = {"errors": {}, "microseconds": {}}
    ways = {"plain": (), "one launch": (DEVICE,)}
    shapes = [(64, 24)] if TINY else [(1000, 512), (1024, 1000), (16_384, 1024)]
    for tokens, width in shapes:
        for mix, reads in (("graves", "after"), ("t2t", "before")):
            _halting_kernel.HALTING_KERNEL_DEVICES = ()
            exact, wanted = slopes(*halting_case(tokens, width, torch.float64, mix, reads), True)
            for way, devices in ways.items():
                _halting_kernel.HALTING_KERNEL_DEVICES = devices
                case = halting_case(tokens, width, torch.bfloat16, mix, reads)
                (own, grads), (again, same) = slopes(*case, True), slopes(*case, True)
                assert torch.equal(own.output, again.output), f"{way}: two calls differ"
                pairs = zip(grads, same, strict=True)
                assert way == "plain" or all(torch.equal(*pair) for pair in pairs), f"{way}: bits"
                other = float((own.steps != exact.steps).double().mean())
                pairs = zip([own.output.detach(), *grads], [exact.output.detach(), *wanted], strict=True)
                gaps = [benchmark.relative_error(mine, true) for mine, true in pairs if true.any()]
                found["errors"][f"{tokens} x {width}, {mix}, {way}"] = {"other steps": other, "largest": max(gaps)}
                print(f"   {tokens} x {width}, {mix}, {way}: {other:.1e} {max(gaps):.1e}", flush=True)
                assert other < 1e-3, f"{way}: tokens take other steps"
                assert max(gaps) < 2e-2, f"{way}: {gaps}"
    for tokens in (64,) if TINY else (1024, 16_384):
        for width in (24,) if TINY else (512, 1024):
            unit, begin, steps, upstream = halting_case(tokens, width, torch.bfloat16, "graves", "after")
            row = found["microseconds"][f"{tokens} x {width}"] = {}
            for way, devices in ways.items():
                _halting_kernel.HALTING_KERNEL_DEVICES = devices
                calls = {
                    "forward": torch.no_grad()(lambda: pondered(unit, begin, steps[:1], False)),
                    "with gradients": lambda: slopes(unit, begin, steps[:1], upstream, False),
                }
                for what, call in calls.items():
                    replayed = benchmark.graph_time([call]).us
                    row[f"{way}, {what}"] = {"eager": benchmark.eager_time([call]).us, "replayed": replayed}
                    print(f"   {tokens} x {width}, {way}, {what}: {row[f'{way}, {what}']}", flush=True)
    _halting_kernel.HALTING_KERNEL_DEVICES = ()
    return found
