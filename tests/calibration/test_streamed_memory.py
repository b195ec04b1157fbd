"""The resident memory of the streamed driver does not grow with the model."""

from __future__ import annotations

import pytest
import torch
from conftest import HELPERS
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

RTN, GPTQ = {"technique": "rtn", "bits": 4, "group_size": 32}, {"technique": "gptq", "bits": 4, "group_size": 32}
PEAK = """
import sys
sys.path.insert(0, {helpers!r})
from pathlib import Path
import torch
from streamed_and_blockwise import streamed
batches = [{{"input_ids": torch.arange(32)[None]}}] * 4 if {calibrated} else None
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
streamed(Path({home!r}), [{step!r}], batches, Path({home!r} + "-out"))
status = Path("/proc/self/status").read_text()
result = int(status.split("VmHWM:")[1].split()[0]) * 1024
"""


def llama(width, layers):
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 8, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes))


def mixtral(width, layers):
    sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 8, "num_key_value_heads": 8}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=layers, num_local_experts=8, **sizes))


def growth(python, folder, width, layers, step, build=llama):
    """Return the slope of peak resident bytes over model bytes, and both peaks."""
    sizes, peaks = [], []
    for count in layers:
        home = folder / f"layers-{count}"
        if not home.exists():
            torch.manual_seed(0)
            build(width, count).save_pretrained(home, max_shard_size="100MB")
        sizes.append(sum(path.stat().st_size for path in home.glob("*.safetensors")))
        code = PEAK.format(helpers=str(HELPERS), home=str(home), step=step, calibrated=step is GPTQ)
        done = python.copy(code)
        assert done.status == 0, done.err
        peaks.append(done.result)
    return (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]), peaks


@pytest.mark.slow
@pytest.mark.parametrize("step", [RTN, GPTQ], ids=["without data", "calibrated"])
def test_memory_does_not_grow_with_the_model(python, tmp_path, step):
    slope, peaks = growth(python, tmp_path, 256, (3, 27), step)
    assert slope < 0.2, peaks  # small models: 75 MB apart, where the interpreter itself varies by a few


@pytest.mark.slow
@pytest.mark.parametrize("step", [RTN, GPTQ], ids=["without data", "calibrated"])
def test_memory_over_two_sizes(python, tmp_path, step):
    slope, peaks = growth(python, tmp_path, 512, (14, 56), step)
    print(f"\n{step['technique']}: peaks {[round(peak / 1e6) for peak in peaks]} MB, slope {slope:.4f} byte per byte")
    assert slope < 0.05, peaks


@pytest.mark.slow
@pytest.mark.parametrize(("step", "layers"), [(RTN, (2, 6)), (GPTQ, (3, 6))], ids=["without data", "calibrated"])
def test_memory_does_not_grow_with_a_mixture_of_experts(python, tmp_path, step, layers):
    # Matrices of 1 MB: of smaller ones, the pages that are mapped when a tensor is counted are a large share.
    slope, peaks = growth(python, tmp_path, 512, layers, step, mixtral)
    print(f"\n{step['technique']}: peaks {[round(peak / 1e6) for peak in peaks]} MB, slope {slope:.4f} byte per byte")
    assert slope < 0.2, peaks
