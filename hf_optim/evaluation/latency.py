"""Time models: greedy generation for those that generate text, a forward pass for the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.tasks import task_of_model
from ..errors import ModelError
from ..toolkit import topology
from ..toolkit.modules.modes import device_of, eval_mode
from .timings import MAX_ROUNDS, MIN_ROUNDS, Timing, time_in_turn

PROMPT, NEW_TOKENS = 32, 64
BATCH, BATCH_TOKENS = 8, 128
# A round repeats short calls until it takes about this long.
ROUND_SECONDS, MAX_CALLS = 0.05, 100


@dataclass(frozen=True)
class Workload:
    """What one call of a timed model computes.

    Attributes:
        key: the metric: ``ms_per_token`` or ``ms_per_example``.
        units: tokens or examples of a call.
        inputs: the model's inputs, on the CPU.
        new_tokens: to generate; None for a forward pass.
        description: of the call, for readers.
    """

    key: str
    units: int
    inputs: Mapping[str, Tensor]
    new_tokens: int | None
    description: str

    def action(self, model: Any, new_tokens: int | None = None) -> Callable[[], object]:
        """Return a function that runs the workload on a model once, and waits for its device.

        ``new_tokens`` generates fewer tokens than the workload, for a warm-up.
        """
        device = device_of(model)
        floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs = {k: v.to(device, floats if v.is_floating_point() else None) for k, v in self.inputs.items()}

        def run() -> None:
            if self.new_tokens is None:
                model(**inputs)
            else:
                _generate(model, inputs["input_ids"], new_tokens or self.new_tokens)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run


def workload_of(
    model: Any, *, prompt: int = PROMPT, new_tokens: int = NEW_TOKENS, batch: int = BATCH, seed: int = 0
) -> Workload | None:
    """Return what to time a model on, or None if there are no inputs for it.

    Models for text generation generate ``new_tokens`` greedily after a prompt of random tokens, batch 1; both lengths
    are halved together until they fit the context. The time for the prompt is included; it is short compared with the
    generation. Other models run a forward pass over ``batch`` random examples: texts of 128 tokens (fewer if the model
    has fewer positions), images of the model's size, or sound.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    if task_of_model(model).tag == "text-generation" and model.can_generate():
        context = getattr(config, "max_position_embeddings", None) or prompt + new_tokens
        while prompt + new_tokens > context and new_tokens > 1:
            prompt, new_tokens = max(1, prompt // 2), new_tokens // 2
        ids = torch.randint(config.vocab_size, (1, prompt), generator=generator)
        description = f"{new_tokens} tokens generated greedily after a prompt of {prompt}, batch 1"
        return Workload("ms_per_token", new_tokens, {"input_ids": ids}, new_tokens, description)
    try:
        dummy = topology.dummy_inputs(model)
    except ModelError:
        return None
    inputs = {key: value.cpu().expand(batch, *value.shape[1:]).clone() for key, value in dummy.items()}
    length = ""
    if set(inputs) == {"input_ids"} and inputs["input_ids"].dim() == 2:
        tokens = min(BATCH_TOKENS, _positions(config))
        # The last token of the dummy is one that some heads look for.
        ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator)
        inputs["input_ids"] = torch.cat([ids[:, :-1], inputs["input_ids"][:, -1:]], 1)
        length = f" of {tokens} tokens"
    return Workload("ms_per_example", batch, inputs, None, f"forward pass over a batch of {batch}{length}")


def time_models(
    models: Mapping[str, Any],
    workload: Workload,
    *,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, Timing]:
    """Return the milliseconds per token or example of each model, measured in turn (``timings.time_in_turn``).

    Args:
        models: by name, each on the device to be timed; their modes are restored afterwards.
        workload: what they run, of the first model.
        min_rounds, max_rounds: see ``time_in_turn``.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
            workload.action(model, min(workload.new_tokens or 0, 8) or None)()
        actions = [workload.action(model) for model in models.values()]
        calls = _calls_per_round(actions[0])
        rounds = [lambda action=action: [action() for _ in range(calls)] for action in actions]
        seconds = time_in_turn(rounds, warm_up=(), min_rounds=min_rounds, max_rounds=max_rounds)
    scale = 1000 / workload.units / calls
    return {name: Timing.of([scale * value for value in own]) for name, own in zip(models, seconds, strict=True)}


def measure_time(model: Any) -> dict[str, Any]:
    """Return the time of a model, as metrics: ``ms_per_token`` or ``ms_per_example``, its spread, ``time_rounds``.

    The spread (``ms_per_token_iqr``) is the interquartile range of the rounds. Empty if the model has no workload.
    """
    workload = workload_of(model)
    return {} if workload is None else time_models({"model": model}, workload)["model"].metrics(workload.key)


def _calls_per_round(action: Callable[[], object]) -> int:
    """Return how many calls take ``ROUND_SECONDS``: a round of one short call would show the host's interruptions."""
    start = time.perf_counter()
    action()
    return max(1, min(MAX_CALLS, round(ROUND_SECONDS / max(time.perf_counter() - start, 1e-6))))


def _positions(config: Any) -> int:
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    # RoBERTa's positions begin behind its padding index.
    return max(8, min((int(n) for n in found if isinstance(n, int) and n > 0), default=BATCH_TOKENS) - 4)


def _generate(model: Any, ids: Tensor, new_tokens: int) -> None:
    from transformers import GenerationConfig

    eos = model.generation_config.eos_token_id
    pad = (eos[0] if isinstance(eos, list) else eos) or 0
    # Exactly new_tokens tokens: an early eos would end the measurement.
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=eos
    )
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
