"""What early exits save at a guaranteed consistency, whether the bound holds, and what lossless drafting saves.

    python examples/adaptive/calm_study.py train FOLDER      # babyllama-1m with uniform loss at every exit
    python examples/adaptive/calm_study.py losses FOLDER     # the loss and the layers of each prompt and threshold
    python examples/adaptive/calm_study.py study FOLDER      # splits, times, the record and its plot

Trained on the training stories; prompts are the first tokens of the calibration and evaluation stories. Splits are of
prompts: one half calibrates, the other is where the mean loss is held against the bound.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hf_optim

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
RECORD = ROOT / "model_cards/adaptive/calm_study.json"
STEPS, WIDTH, ROWS, RATE = 150, 128, 8, 1e-3
PROMPT, LENGTH, PROMPTS = 64, 32, 400
SPLITS, EPSILON = 20, 0.05
DELTAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
CANDIDATES = {
    "softmax_gap": (0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4),
    "state": (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9),
}
BATCH = 50
exits = hf_optim.early_exit


def shared() -> Path:
    import os

    return Path(os.environ.get("HF_OPTIM_TEST_DATA", SHARED))


def stories(name: str, tokenizer) -> list[torch.Tensor]:
    lines = (shared() / f"data/tinystories/{name}.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [torch.tensor([tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False).input_ids]) for t in texts]


def train(folder: Path) -> None:
    """Train every exit at once, with the same weight, through the model's own norm and head."""
    torch.manual_seed(0)
    home = shared() / "models/babyllama-1m"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(home).float(), AutoTokenizer.from_pretrained(home)
    text = torch.cat(stories("train", tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        starts = torch.randint(0, len(text) - WIDTH, (ROWS,))
        batch = torch.stack([text[start : start + WIDTH] for start in starts])
        states = model(input_ids=batch, output_hidden_states=True, use_cache=False).hidden_states
        logits = [model.lm_head(model.model.norm(state)) for state in states[1:-1]] + [model.lm_head(states[-1])]
        losses = [
            torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), batch[:, 1:].flatten()) for each in logits
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        if step % 50 == 0:
            print(step, [round(float(each.detach()), 3) for each in losses], flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"last_losses": [float(each.detach()) for each in losses]}))


def load(folder: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = stories("calibration", tokenizer) + stories("eval", tokenizer)
    return model, [text[:PROMPT] for text in texts if len(text) > PROMPT][:PROMPTS]


def losses(folder: Path) -> None:
    """Write the loss of every prompt at every threshold, and the blocks that its tokens took."""
    model, prompts = load(folder)
    full = exits.outputs(model, prompts, None, LENGTH)
    found: dict[str, list] = {}
    for kind, candidates in CANDIDATES.items():
        found[kind] = []
        for threshold in candidates:
            settings = exits.EarlyExit(confidence=kind, threshold=threshold, length=LENGTH)
            lost, depth = [], []
            for start in range(0, len(prompts), BATCH):
                ids = torch.stack(prompts[start : start + BATCH])
                made = hf_optim.generate(
                    model, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False,
                    pad_token_id=0, return_dict_in_generate=True, early_exit=settings,
                )  # fmt: skip
                depth += [row[row > 0].float()[1:].mean().item() for row in made.layers]
                for tokens, layers, expected in zip(
                    made.sequences[:, PROMPT:].tolist(), made.layers.tolist(), full[start:], strict=False
                ):
                    own = [token for token, used in zip(tokens, layers, strict=False) if used]
                    lost.append([exits.rouge_l(own, expected), exits.edit_distance(own, expected)])
            found[kind].append({"threshold": threshold, "losses": lost, "layers": depth})
            means = [sum(each[i] for each in lost) / len(lost) for i in (0, 1)]
            print(kind, threshold, f"rouge_l {means[0]:.3f} edit {means[1]:.3f} layers {sum(depth) / len(depth):.2f}")
    (folder / "losses.json").write_text(json.dumps(found))


def split_study(found: dict) -> list[dict]:
    """Return, for each confidence and bound, what 20 halves prove and what the other halves lose."""
    rows = []
    for kind, tested in found.items():
        count = len(tested[0]["losses"])
        for delta in DELTAS:
            kept: dict[str, list] = {"threshold": [], "test_loss": [], "layers": []}
            for seed in range(SPLITS):
                order = random.Random(seed).sample(range(count), count)
                own, other = order[: count // 2], order[count // 2 :]
                sequence = ((each["threshold"], [each["losses"][i][0] for i in own]) for each in tested)
                chosen, _ = exits.fixed_sequence(sequence, delta, EPSILON)
                if chosen is not None:
                    each = next(one for one in tested if one["threshold"] == chosen.threshold)
                    kept["threshold"].append(chosen.threshold)
                    kept["test_loss"].append(statistics.fmean(each["losses"][i][0] for i in other))
                    kept["layers"].append(statistics.fmean(each["layers"][i] for i in other))
            row = {"confidence": kind, "delta": delta, "splits": SPLITS, "proven": len(kept["threshold"])}
            if kept["threshold"]:
                row |= {
                    "above_bound": sum(loss > delta for loss in kept["test_loss"]),
                    "largest_test_loss": max(kept["test_loss"]),
                    "test_loss": statistics.fmean(kept["test_loss"]),
                    "layers": statistics.fmean(kept["layers"]),
                    "threshold": statistics.median_low(kept["threshold"]),
                }
            rows.append(row)
    return rows


def seconds(calls: dict, rounds: int) -> dict[str, float]:
    """Return the shortest time of each call; they take turns, so that all see the same machine."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def timed(model, prompts, new: int, settings: dict, rounds: int) -> dict[str, dict]:
    """Return tokens per second at batch 1, and the speed beside transformers' loop on the same prompts."""

    def run(setting):
        def call():
            for prompt in prompts:
                given = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
                given |= {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
                if setting is None:
                    model.generate(**given)
                else:
                    hf_optim.generate(model, **given, early_exit=setting)

        return call

    best = seconds({name: run(setting) for name, setting in {"stock": None, **settings}.items()}, rounds)
    return {
        name: {"tokens_per_s": new * len(prompts) / took, "speed": best["stock"] / took} for name, took in best.items()
    }


def wide_model():
    """Return a decoder of 12 blocks whose weights no cache of a CPU holds, with random weights: for times alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def study(folder: Path) -> None:
    model, prompts = load(folder)
    found = json.loads((folder / "losses.json").read_text())
    record: dict = {"training": {"steps": STEPS, "loss": "uniform"}, "prompt": PROMPT, "length": LENGTH}
    record["epsilon"], record["prompts"] = EPSILON, len(found["softmax_gap"][0]["losses"])
    record["thresholds"] = [
        {
            "confidence": kind, "threshold": each["threshold"], "layers": statistics.fmean(each["layers"]),
            **{name: statistics.fmean(one[i] for one in each["losses"]) for i, name in enumerate(("rouge_l", "edit"))},
        }
        for kind, tested in found.items() for each in tested
    ]  # fmt: skip
    record["splits"] = split_study(found)
    few, gap = prompts[:4], {"confidence": "softmax_gap", "length": LENGTH}
    chosen = {
        f"delta {row['delta']:g}": exits.EarlyExit(threshold=row["threshold"], **gap)
        for row in record["splits"] if row["confidence"] == "softmax_gap" and row["proven"] == SPLITS
    }  # fmt: skip
    chosen["never"] = exits.EarlyExit(threshold=2.0, **gap)
    record["times"] = timed(model, few, LENGTH, chosen, 3)
    drafts = {
        f"after block {layer}, {n} drafts": exits.EarlyExit(lossless=True, layers=(layer,), drafts=n)
        for layer in (0, 1, 2) for n in (2, 4)
    }  # fmt: skip
    record["lossless"] = timed(model, few, LENGTH, drafts, 3)
    for name, setting in drafts.items():
        counts = [0, 0, 0]
        for prompt in few:
            given = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
            given |= {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}
            expected = model.generate(**given)
            made = hf_optim.generate(model, **given, early_exit=setting, return_dict_in_generate=True)
            assert torch.equal(made.sequences, expected)
            counts = [a + b for a, b in zip(counts, (made.rounds, made.drafted, made.accepted), strict=True)]
        record["lossless"][name] |= {"accepted": counts[2] / max(1, counts[1]), "rounds": counts[0]}
    wide, prompt = wide_model(), [torch.randint(0, 4096, (32,), generator=torch.Generator().manual_seed(0))]
    forced = {
        f"all after block {layer} of 12": exits.EarlyExit(threshold=0.0, layers=(layer,)) for layer in (2, 5, 8)
    } | {"never": exits.EarlyExit(threshold=2.0)}
    record["wide"] = timed(wide, prompt, 16, forced, 3)
    with torch.no_grad():  # the exit is then the model: the most that drafts can save
        for block in wide.model.layers[3:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    best = {f"all accepted, {n} drafts": exits.EarlyExit(lossless=True, layers=(2,), drafts=n) for n in (3, 7)}
    record["wide_lossless"] = timed(wide, prompt, 16, best, 3)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    plot(record)


def plot(record: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kind in CANDIDATES:
        tried = [each for each in record["thresholds"] if each["confidence"] == kind]
        left.plot([each["layers"] for each in tried], [each["rouge_l"] for each in tried], "o-", label=kind)
        proven = [row for row in record["splits"] if row["confidence"] == kind and row["proven"]]
        right.plot([row["delta"] for row in proven], [row["largest_test_loss"] for row in proven], "o-", label=kind)
    left.set(xlabel="blocks for each token, of 5", ylabel="1 - ROUGE-L beside full depth")
    right.plot([0, max(DELTAS)], [0, max(DELTAS)], ":", color="grey", label="the bound")
    right.set(xlabel="bound (delta)", ylabel=f"largest test loss of {SPLITS} splits")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(RECORD.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"train": train, "losses": losses, "study": study}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("folder", type=Path, help="of the trained model and its losses")
    args = parser.parse_args()
    parts[args.part](args.folder)
