"""What quantized keys and values cost in quality, beside transformers' own quantized caches.

    python examples/kv_cache_quality.py MODELS_FOLDER DATA_FOLDER OUT.json [WORD ...]

Perplexity at full context: windows of text go through the cache token by token, so that every prediction reads
quantized keys and values. Recall: one key of 8,192 is planted in random keys, and attention has to find it. quanto and
hqq are measured if they are installed (``pip install optimum-quanto hqq``). With words, only caches that have one of
them in their names are measured; the results are added to OUT.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, QuantizedCache

from hf_optim import KeyValueScheme, cache_size, key_value_cache
from hf_optim.toolkit.compat import CACHE

ROWS = 24
GROUP, RESIDUAL = 32, 32


def ours(bits, keys="channel", symmetric=None, residual=RESIDUAL):
    return lambda model: key_value_cache(model, KeyValueScheme(bits, keys, GROUP, residual, symmetric))


def theirs(backend, bits, axis=0):
    def make(model):
        group = min(64, model.config.head_dim or 64)
        settings = {"nbits": bits, "axis_key": axis, "axis_value": axis, "q_group_size": group}
        settings = {} if backend == "fp8" else {**settings, "residual_length": RESIDUAL}
        return QuantizedCache(backend=backend, config=model.config, **settings)

    return make


CACHES = {
    "16 bits": lambda model: DynamicCache(config=model.config),
    "int8, keys by channel": ours(8),
    "int8, keys by token": ours(8, "token"),
    "float8, keys by channel": ours("float8"),
    "float8, keys by token": ours("float8", "token"),
    "int4, keys by channel": ours(4),
    "int4 symmetric, keys by channel": ours(4, symmetric=True),
    "int4, keys by token": ours(4, "token"),
    "int4, keys by channel, no residual": ours(4, residual=0),
    "transformers quanto, 4 bits": theirs("quanto", 4),
    "transformers quanto, 2 bits": theirs("quanto", 2),
    "transformers hqq, 8 bits": theirs("hqq", 8, 1),
    "transformers hqq, 4 bits": theirs("hqq", 4, 1),
    "transformers fp8": theirs("fp8", 8),
}


def windows(home, data, length):
    """Token ids [ROWS, length]: stories one after the other, each after bos."""
    tokenizer = AutoTokenizer.from_pretrained(home)
    ids = []
    for line in (data / "tinystories" / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        ids += [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids]
        if len(ids) >= ROWS * length:
            break
    return torch.tensor(ids[: ROWS * length]).view(ROWS, length)


@torch.no_grad()
def perplexity(model, ids, cache):
    """Perplexity of the tokens after the first of each row, read through a cache one by one."""
    total = 0.0
    for at in range(ids.shape[1] - 1):
        logits = model(ids[:, at : at + 1], use_cache=True, **{CACHE: cache}).logits[:, -1]
        total += float(nn.functional.cross_entropy(logits.double(), ids[:, at + 1], reduction="sum"))
    return float(torch.tensor(total / (len(ids) * (ids.shape[1] - 1))).exp())


class Head(nn.Module):
    """What the caches need of a model of one layer with heads of 128."""

    def __init__(self):
        super().__init__()
        self.config = LlamaConfig(
            num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, hidden_size=1024, head_dim=128
        )


@torch.no_grad()
def recall(make, tokens=8192, trials=8):
    """Share of heads whose largest weight is at the planted key, and the error of what they attend to.

    Keys have four channels that are large for every token, as those of trained models do. The query is the planted key
    without these, scaled so that it takes most of the weight. Another key is the planted one times 0.98: a cache must
    keep them apart.
    """
    model, found, errors, weights = Head(), [], [], []
    for trial in range(trials):
        random = torch.Generator().manual_seed(trial)
        key, value = (torch.randn(1, 8, tokens, 128, generator=random) for _ in range(2))
        at = int(torch.randint(tokens // 10, tokens - 200, (1,), generator=random))
        query = key[:, :, at : at + 1] * 1.3
        key[:, :, at - 100] = key[:, :, at] * 0.98
        key[..., 5::32] += 12
        query[..., 5::32] = 0.2
        cache = make(model)
        for part in (slice(0, tokens - 512), slice(tokens - 512, tokens)):  # a prefill gets its own keys back
            k, v = cache.update(key[:, :, part], value[:, :, part], 0)

        def attend(k, v, query=query):
            p = (query.double() @ k.double().transpose(2, 3) * 128**-0.5).softmax(-1)
            return p, p @ v.double()

        (p, out), (exact, expected) = attend(k, v), attend(key, value)
        found.append((p.argmax(-1) == at).double().mean())
        weights.append(float((p[..., at] - exact[..., at]).abs().mean()))
        errors.append(float((out - expected).norm() / expected.norm()))
    count = len(errors)
    return {
        "recall": float(sum(found) / count),
        "weight_difference": sum(weights) / count,
        "value_error": sum(errors) / count,
    }


def bytes_of(cache, model, length):
    """Bytes of a token of one sequence, as a share of 16 bits; None for caches that are not counted."""
    scheme = getattr(cache.layers[0], "scheme", None)
    if scheme is None:
        return 1.0 if type(cache) is DynamicCache else None
    dense = cache_size(model.config, 1, length)
    return cache_size(model.config, 1, length, scheme).total / dense.total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="a folder of models")
    parser.add_argument("data", type=Path, help="a folder of texts")
    parser.add_argument("out", type=Path, help="the JSON file that results are added to")
    parser.add_argument("words", nargs="*", help="measure only the caches that have one of them in their names")
    args = parser.parse_args()
    models, data, out, words = args.models, args.data, args.out, args.words
    found = json.loads(out.read_text()) if out.exists() else {}
    found |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "group": GROUP,
        "residual": RESIDUAL,
    }
    found.setdefault("caches", {})
    loaded = {}
    for name in ("babyllama-1m", "stories260k"):
        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval()
        length = model.config.max_position_embeddings
        loaded[name] = model, windows(models / name, data, length)
    for name, make in CACHES.items():
        if words and not any(word in name for word in words):
            continue
        row = found["caches"].setdefault(name, {})
        for title, (model, ids) in loaded.items():
            start = time.time()
            try:
                row[title] = perplexity(model, ids, make(model))
            except Exception as problem:
                row[title] = f"{type(problem).__name__}: {str(problem)[:160]}"
            print(f"{name:36s} {title} x {ids.shape[1]}: {row[title]}  ({time.time() - start:.0f} s)", flush=True)
        try:
            row["needle"] = recall(make)
            row["share_of_16_bits"] = bytes_of(make(Head()), Head(), 8192)
        except Exception as problem:
            row["needle"] = f"{type(problem).__name__}: {str(problem)[:160]}"
        print(f"{name:36s} needle: {row['needle']}", flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
