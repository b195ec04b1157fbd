"""Padding removal on a GPU: checks against stock transformers, then times of a BERT-base shape, and where they go.

    python examples/gpu/padding_removal.py OUT.json          TINY=1 tries it on a CPU in small

64 sentences padded to 512, 19 % of them valid, bfloat16, random weights. Beside the padded batch: the same sentences
sorted by length in four batches of 16, each padded to its longest (what a caller can do), and rows of 512 with as many
tokens and no padding (the bound: nothing to remove). Medians of eager calls under no_grad, each with its synchronize;
"host" is the time until a call returns, without waiting for the device.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings

import torch
import transformers
from transformers import BertConfig, BertModel

from hf_optim.toolkit.packing import KINDS, attach_packing, detach_packing, packing_of

TINY = os.environ.get("TINY") == "1"
DEVICE = "cpu" if TINY else "cuda"
BATCH, LENGTH, SHARE = (8, 48, 0.19) if TINY else (64, 512, 0.19)
ROUNDS = 2 if TINY else 30


def lengths_for(batch: int, length: int, share: float, seed: int) -> torch.Tensor:
    """Return lengths of sentences whose sum is a share of the places of a batch."""
    drawn = torch.rand(batch, generator=torch.Generator().manual_seed(seed)) + 0.1
    wanted = drawn / drawn.sum() * share * batch * length
    return wanted.round().long().clamp(1, length)


def batch_of(lengths: torch.Tensor, length: int, left: bool = False, low: int = 5, high: int = 1000) -> dict:
    place = torch.arange(length)
    mask = place >= length - lengths[:, None] if left else place < lengths[:, None]
    ids = torch.randint(low, high, mask.shape, generator=torch.Generator().manual_seed(1)).masked_fill(~mask, 1)
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.long().to(DEVICE)}


def synchronize() -> None:
    if not TINY:
        torch.cuda.synchronize()


def median(call, rounds: int = ROUNDS) -> float:
    times = []
    for k in range(rounds + 3):
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        if k >= 3:
            times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def host(call, rounds: int = ROUNDS) -> float:
    times = []
    for k in range(rounds + 3):
        synchronize()
        begin = time.perf_counter()
        call()
        if k >= 3:
            times.append(time.perf_counter() - begin)
        synchronize()
    return 1e3 * statistics.median(times)


def bert(layers: int, dtype: torch.dtype, **changes) -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128} if TINY else {}
    return BertModel(BertConfig(num_hidden_layers=layers, **sizes, **changes)).to(DEVICE, dtype).eval()


def small(kind: str):
    torch.manual_seed(0)
    size = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"intermediate_size": 256, "max_position_embeddings": 600, "pad_token_id": 1}
    if kind == "bert":
        return BertModel(BertConfig(**size))
    if kind == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**size))
    if kind == "mpnet":
        return transformers.MPNetModel(transformers.MPNetConfig(**size))
    if kind == "modernbert":
        config = transformers.ModernBertConfig(
            **size,
            local_attention=16,
            global_attn_every_n_layers=2,
            eos_token_id=2,
            bos_token_id=3,
            cls_token_id=3,
            sep_token_id=2,
        )
        return transformers.ModernBertModel(config)
    config = transformers.T5Config(vocab_size=1000, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config)


def checks() -> dict[str, dict]:
    """Return for each kind, dtype and side the largest difference at valid tokens, and of the gradients."""
    found = {}
    for kind in ("bert", "roberta", "modernbert", "mpnet", "t5"):
        for dtype in (torch.float32, torch.bfloat16):
            for left in (False, True):
                name = f"{kind} {str(dtype)[6:]} {'left' if left else 'right'}"
                try:
                    model = small(kind).to(DEVICE, dtype).eval()
                    inputs = batch_of(lengths_for(9, 96, 0.3, 2), 96, left)
                    mask = inputs["attention_mask"].bool()
                    reference = small(kind).to(DEVICE, torch.float64).eval()

                    def run(one):
                        one.zero_grad()
                        states = one(**inputs)[0]
                        (states.double() * mask[..., None]).square().sum().backward()
                        grads = torch.cat([p.grad.double().flatten() for p in one.parameters() if p.grad is not None])
                        return states.detach().double()[mask], grads

                    exact, stock = run(reference), run(model)
                    attach_packing(model, 1.0, "check")
                    packed = run(model)
                    detach_packing(model)
                    errors = {
                        f"{what} {who}": float((got[k] - exact[k]).norm() / exact[k].norm())
                        for k, what in enumerate(("values", "gradients"))
                        for who, got in (("stock", stock), ("packed", packed))
                    }
                    ok = all(
                        errors[f"{what} packed"] <= 2 * errors[f"{what} stock"] + 1e-6
                        for what in ("values", "gradients")
                    )
                    found[name] = {**errors, "ok": ok}
                except Exception as error:
                    found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                print(name, {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in found[name].items()}, flush=True)
    return found


def flattening() -> str:
    """Return what sentence-transformers' own flattening of batches does on this machine."""
    try:
        import pathlib

        import sentence_transformers
        from transformers.utils import is_flash_attn_2_available

        lines = []
        for path in sorted(pathlib.Path(sentence_transformers.__file__).parent.rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if any(word in line for word in ("flatten_inputs", "can_flatten", "def auto_model", "Flattening")):
                    lines.append(f"{path.name}:{number}: {line.strip()[:110]}")
    except Exception as error:
        return f"not installed ({type(error).__name__})"
    print(*lines[:12], sep="\n")
    return f"sentence-transformers {sentence_transformers.__version__}, flash-attn: {is_flash_attn_2_available()}"


def main() -> None:
    warnings.simplefilter("ignore")
    print("torch", torch.__version__, "transformers", transformers.__version__, sorted(KINDS), flush=True)
    result: dict = {"torch": torch.__version__, "transformers": transformers.__version__, "device": DEVICE}
    if not TINY:
        result["device"] = torch.cuda.get_device_name()
    result["peer"] = flattening()
    print(result["peer"], flush=True)
    result["checks"] = checks()
    dtype = torch.float32 if TINY else torch.bfloat16
    model = bert(2 if TINY else 12, dtype)
    lengths = lengths_for(BATCH, LENGTH, SHARE, 0)
    inputs = batch_of(lengths, LENGTH)
    total = int(lengths.sum())
    result |= {"batch": BATCH, "length": LENGTH, "valid": total, "share": total / (BATCH * LENGTH)}
    rows = max(1, round(total / LENGTH))
    bound = batch_of(torch.full((rows,), LENGTH), LENGTH)
    del bound["attention_mask"]
    parts = [batch_of(part, int(part.max())) for part in lengths.sort(descending=True).values.split(BATCH // 4)]

    def in_parts():
        for part in parts:
            model(**part)

    times: dict = {}
    with torch.no_grad():
        times["stock"] = median(lambda: model(**inputs))
        times["sorted in four batches, stock"] = median(in_parts)
        times["no padding, stock"] = median(lambda: model(**bound))
        times["no padding, stock, host"] = host(lambda: model(**bound))
        stock = model(**inputs)[0].double()
        attach_packing(model, 0.95, "times", capture=False)
        times["packed, launched"] = median(lambda: model(**inputs))
        times["packed, launched, host"] = host(lambda: model(**inputs))
        times["sorted in four batches, packed, launched"] = median(in_parts)
        attach_packing(model, 0.95, "times")
        times["packed"] = median(lambda: model(**inputs))
        times["packed, host"] = host(lambda: model(**inputs))
        times["sorted in four batches, packed"] = median(in_parts)
        mask = inputs["attention_mask"].bool()
        difference = (model(**inputs)[0].double() - stock)[mask].norm() / stock[mask].norm()
        result["packed, captured: difference from stock"] = float(difference)
        others = [batch_of(lengths_for(BATCH, LENGTH, SHARE, seed), LENGTH) for seed in range(1, 2 * ROUNDS + 1)]
        each = []
        for other in others:
            synchronize()
            start = time.perf_counter()
            model(**other)
            synchronize()
            each.append((time.perf_counter() - start) * 1e3)
        times["packed, a batch of other lengths, first 10"] = statistics.median(each[:10])
        times["packed, a batch of other lengths, last half"] = statistics.median(each[len(each) // 2 :])
        times["packed, a batch of other lengths, slowest"] = max(each)
        result["graphs"] = len(packing_of(model).captured.graphs)
        if not TINY:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(5):
                    model(**inputs)
                synchronize()
            events = profile.key_averages()
            times["packed, device"] = sum(e.self_device_time_total for e in events) / 5e3
            top = sorted(events, key=lambda e: -e.self_device_time_total)[:12]
            result["kernels"] = {e.key[:80]: [e.count / 5, e.self_device_time_total / 5e3] for e in top}
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for _ in range(5):
                    model(**inputs)
            top = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)[:15]
            result["operators"] = {e.key[:60]: [e.count / 5, e.self_cpu_time_total / 5e3] for e in top}
        detach_packing(model)
    result["ms"] = times
    for key in ("ms", "kernels", "operators"):
        for name, value in result.get(key, {}).items():
            print(f"{name:60s} {value}")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
