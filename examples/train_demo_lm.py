"""Train the bundled demo model: a 3.5 M parameter Llama on the Python standard library's own source.

    python examples/train_demo_lm.py --steps 20                 # a laptop CPU, under two minutes: a smoke test
    python examples/train_demo_lm.py --device cuda --compile    # the published settings: a minute on an H200

Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load offline: float16 weights, the tokenizer,
``training.json`` (every number of the run) and a model card rendered from it. No checkpoint is selected: the weights
are those of the last step of a fixed schedule. The modules in ``demo_corpus.HELD_OUT`` are used only for evaluation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_optim.cli.jobs import demo_corpus

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 2048
CONTEXT = 512  # positions of the model, and the sequence length of every reported loss
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 384,
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, so every string round-trips exactly. It prepends ``<s>``, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save the tokenizer, with a class name that exists in transformers 4 and 5."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return the token ids of all texts, joined: ``[n]``, int64; each text is enclosed in ``<s>`` and ``</s>``."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([i for text in encoded for i in (*text.ids, tokenizer.eos_token_id)])


def build_model(tokenizer: PreTrainedTokenizerFast, context: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        **SHAPE,
        vocab_size=VOCABULARY,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def random_sequences(stream: torch.Tensor, batch: int, length: int, bos: int) -> torch.Tensor:
    """Return token ids ``[batch, length]`` from random positions of the stream.

    Half of the sequences start with ``<s>``, so that the model predicts text from the middle of a file equally well
    with and without it.
    """
    starts = torch.randint(len(stream) - length, (batch, 1), device=stream.device)
    sequences = stream[starts + torch.arange(length, device=stream.device)]
    sequences[: batch // 2, 0] = bos
    return sequences


def add_dropout(model: LlamaForCausalLM, rate: float) -> list:
    """Add dropout after the embedding and on the outputs of attention and MLP, since Llama has none.

    Returns the handles that remove it.
    """
    modules = [model.model.embed_tokens]
    modules += [linear for layer in model.model.layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]

    def drop(module, inputs, output):
        return torch.nn.functional.dropout(output, rate, module.training)

    return [module.register_forward_hook(drop) for module in modules] if rate else []


def train(model, stream, *, steps, batch, length, lr, weight_decay, dropout, compile_model, progress) -> None:
    """Train with AdamW, bfloat16 autocast on a GPU, and a linear warm-up over 5 % of the steps, then cosine to zero.

    The corpus is small for the model: only weight decay and dropout keep the model from memorizing it.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)

    def loss_of(ids):
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type == "cuda"):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    handles = add_dropout(model, dropout)
    compute_loss = torch.compile(loss_of) if compile_model else loss_of
    model.train()
    for step in range(1, steps + 1):
        loss = compute_loss(random_sequences(stream, batch, length, model.config.bos_token_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            model.eval()
            progress(step, loss.item())
            model.train()
    model.eval()
    for handle in handles:
        handle.remove()


@torch.no_grad()
def mean_loss(model, stream: torch.Tensor, most_windows: int | None = None, batch: int = 32) -> float:
    """Compute the mean nats per token over windows of 512 tokens.

    Windows overlap by one token, so that each token is predicted once. ``most_windows`` evenly spaced windows are used,
    or all. An incomplete window at the end is dropped.
    """
    windows = stream.unfold(0, CONTEXT, CONTEXT - 1)
    if most_windows is not None and most_windows < len(windows):
        windows = windows[torch.linspace(0, len(windows) - 1, most_windows).long()]
    parts = windows.to(model.device).split(batch)
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids) for ids in parts]
    return sum(losses) / len(windows)


def save_half(model, directory: Path, stream: torch.Tensor, reference: float, most_windows: int | None) -> float:
    """Save float16 weights, reload them, and return the held-out loss of the reloaded model.

    On a CPU the reloaded weights are converted to float32. Raises ``RuntimeError`` if the loss differs from
    ``reference`` by more than 0.1 %.
    """
    device = model.device
    model.half().save_pretrained(directory)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    reloaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    loss = mean_loss(reloaded, stream, most_windows)
    if abs(loss - reference) > 1e-3 * reference:
        raise RuntimeError(f"float16 changed the held-out loss from {reference:.5f} to {loss:.5f}")
    return loss


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language:
- code
tags:
- llama
- python
- hf-optim
- demo
---

# A small Llama that writes Python, for demonstrations

{parameters:,} parameters, trained from random weights (not a pretrained model, and not a fine-tune of one) on the
source code of the Python {corpus_python} standard library by `examples/train_demo_lm.py`. It ships inside `hf-optim`
so that a compression and its cost in quality can be measured within a minute, on a CPU, without a download.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {layers} layers, width {width}, {heads} heads \
({kv_heads} for keys and values), MLP {mlp}, context {context}, tied embeddings |
| tokenizer | byte-level BPE, {vocabulary} tokens; text round-trips exactly; `<s>` is prepended |
| weights | float16, {weight_bytes:,} bytes |
| training | {steps:,} steps of {batch} x {seq_len} tokens = {tokens_seen:,} tokens, \
{epochs:.1f} passes over {train_tokens:,}; AdamW, learning rate {lr}, weight decay {weight_decay}, \
dropout {dropout}, cosine; seed {seed} |
| run on | {device_name}, {wall_seconds:.0f} s; torch {torch_version}, transformers {transformers_version} |

## Results

| | nats per token | perplexity | bits per byte |
|---|---|---|---|
| held-out modules | {held_out_loss:.4f} | {held_out_perplexity:.3f} | {held_out_bits_per_byte:.4f} |
| training modules ({train_windows} evenly spaced windows) | {train_loss:.4f} | {train_perplexity:.3f} \
| {train_bits_per_byte:.4f} |

Windows of 512 tokens, each token predicted once; {held_out_scope}. The float16 file scored {held_out_loss_float16:.4f}
nats per token. The weights are those of the last step of a fixed schedule: no checkpoint was selected.{tuning}
`training.json` has every number.

## Data

Every `*.py` file of the standard library except tests, generated tables and build records;
`hf_optim.cli.jobs.demo_corpus` is the exact definition. Held out completely, and never trained on:
{held_out}.
The Python source is under the PSF licence; it was only the training corpus, and its files are not part of this model.

## Use and limits

For demonstrating and testing compression: the model is large enough that pruning, quantization and distillation change
its loss, and small enough for a laptop. Its output looks like Python and is mostly meaningless. It was trained only on
the code and comments of the standard library, may repeat that source verbatim, was not aligned or filtered, and should
not be used to write code. Its perplexity cannot be compared with that of other models, because its vocabulary is
different.
"""


def render_card(record: dict) -> str:
    names = ", ".join(f"`{name}`" for name in record["held_out"])
    whole = record["held_out_windows"] is None
    scope = "all of the held-out modules" if whole else f"{record['held_out_windows']} evenly spaced held-out windows"
    note = f"\n{record['note']}" if record["note"] else ""
    return CARD.format_map(record | {"held_out": names, "held_out_scope": scope, "tuning": note})


def metrics_of(split: str, loss: float, stream: torch.Tensor, texts: list[str]) -> dict[str, float]:
    """Return the three metrics of the card from a loss in nats per token."""
    tokens_per_byte = len(stream) / sum(len(text.encode()) for text in texts)
    bits_per_byte = loss * tokens_per_byte / math.log(2)
    return {f"{split}_loss": loss, f"{split}_perplexity": math.exp(loss), f"{split}_bits_per_byte": bits_per_byte}


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, help="sequences per step (default: 64 on a GPU, 4 on a CPU)")
    parser.add_argument("--seq-len", type=int, default=CONTEXT)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=2.0)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    parser.add_argument("--output", type=Path, default=Path("demo-model"))
    parser.add_argument("--corpus", type=Path, help="the Lib folder of another Python (default: the running one's)")
    parser.add_argument("--corpus-python", default=platform.python_version(), help="the Python version of that folder")
    parser.add_argument("--eval-windows", type=int, help="held-out windows (default: all on a GPU, 16 on a CPU)")
    parser.add_argument("--note", default="", help="a sentence for the card, on how the settings were chosen")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    options.batch = options.batch or (64 if on_gpu else 4)
    options.eval_windows = options.eval_windows or (None if on_gpu else 16)
    return options


def main() -> None:
    options = parse_arguments()
    device = torch.device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    started = time.perf_counter()

    train_texts = list(demo_corpus.texts("train", root=options.corpus))
    held_out_texts = list(demo_corpus.texts("held_out", root=options.corpus))
    tokenizer = train_tokenizer(train_texts)
    train_stream = token_stream(tokenizer, train_texts).to(device)
    held_out_stream = token_stream(tokenizer, held_out_texts).to(device)
    assert tokenizer.decode(held_out_stream, skip_special_tokens=True) == "".join(held_out_texts)
    print(f"corpus: {len(train_stream):,} tokens to train on, {len(held_out_stream):,} held out", flush=True)

    model = build_model(tokenizer, max(CONTEXT, options.seq_len)).to(device)
    train_started = time.perf_counter()

    def progress(step: int, loss: float) -> None:
        held_out = mean_loss(model, held_out_stream, 64 if device.type == "cuda" else 4)
        seconds = time.perf_counter() - train_started
        print(f"step {step:6}  loss {loss:.4f}  held-out {held_out:.4f} (a few windows)  {seconds:.0f} s", flush=True)

    train(
        model,
        train_stream,
        steps=options.steps,
        batch=options.batch,
        length=options.seq_len,
        lr=options.lr,
        weight_decay=options.weight_decay,
        dropout=options.dropout,
        compile_model=options.compile,
        progress=progress,
    )
    wall_seconds = time.perf_counter() - started

    train_windows = 256 if options.eval_windows is None else options.eval_windows
    train_loss = mean_loss(model, train_stream, train_windows)
    held_out_loss = mean_loss(model, held_out_stream, options.eval_windows)
    parameters = model.num_parameters()
    half_loss = save_half(model, options.output, held_out_stream, held_out_loss, options.eval_windows)
    save_tokenizer(tokenizer, options.output)

    config = model.config
    record = dict(
        parameters=parameters,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        weight_bytes=(options.output / "model.safetensors").stat().st_size,
        steps=options.steps,
        batch=options.batch,
        seq_len=options.seq_len,
        tokens_seen=options.steps * options.batch * options.seq_len,
        train_tokens=len(train_stream),
        epochs=options.steps * options.batch * options.seq_len / len(train_stream),
        lr=options.lr,
        weight_decay=options.weight_decay,
        dropout=options.dropout,
        seed=options.seed,
        **metrics_of("train", train_loss, train_stream, train_texts),
        train_windows=train_windows,
        **metrics_of("held_out", held_out_loss, held_out_stream, held_out_texts),
        held_out_windows=options.eval_windows,
        held_out_loss_float16=half_loss,
        held_out_tokens=len(held_out_stream),
        held_out=list(demo_corpus.HELD_OUT),
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU",
        wall_seconds=round(wall_seconds, 1),
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        corpus_python=options.corpus_python,
        corpus_sha256={"train": digest(train_texts), "held_out": digest(held_out_texts)},
        note=options.note,
    )
    (options.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.output / "README.md").write_text(render_card(record))
    print(f"held-out {held_out_loss:.4f} nats per token, perplexity {math.exp(held_out_loss):.2f}: {options.output}")


if __name__ == "__main__":
    main()
