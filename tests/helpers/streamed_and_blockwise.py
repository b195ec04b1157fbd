"""Run one recipe on one checkpoint under the blockwise and the streamed driver, and compare the results."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

import hf_optim
from hf_optim import OptimConfig
from hf_optim.checkpoints import meta_model, saving
from hf_optim.checkpoints.source import ModelSource, load_model
from hf_optim.cli.jobs.streamed import StreamedJob
from hf_optim.data.calibration_set import build_calibration_data
from hf_optim.toolkit import topology


def random_batches(model, count=3, seed=0):
    """Return batches of two examples for any tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            key: torch.randn((2, *value.shape[1:]), generator=generator)
            if value.is_floating_point()
            else torch.randint(3, 60, (2, 7), generator=generator)
            for key, value in topology.dummy_inputs(model).items()
        }
        for _ in range(count)
    ]


def recipe_of(steps, driver, spill=None):
    return OptimConfig(steps=OptimConfig.parse(list(steps)).steps, driver=driver, spill=spill)


def blockwise(home: Path, steps, batches, output: Path):
    """Run the blockwise driver, and save the result to ``output``. Returns the model."""
    model = load_model(ModelSource(str(home)))
    made = hf_optim.optimize(model, recipe_of(steps, "blockwise"), batches)
    saving.save(hf_optim.run_of(made), output)
    return made


def streamed(home: Path, steps, batches, output: Path, spill=None, resume=False):
    """Run the streamed driver, and save the result to ``output``."""
    source = ModelSource(str(home))
    built = meta_model.build(source)
    recipe = recipe_of(steps, "streamed", spill)
    data = build_calibration_data(batches, model_config=built.model.config) if batches is not None else None
    job = StreamedJob(recipe, built, source, output.with_name(f".{output.name}.journal"), resume, data)
    job.calibrate()
    job.save(output)
    job.output.remove()
    return job.run


def tensors_of(home: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, from all its shards."""
    found = {}
    for path in sorted(home.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                assert key not in found
                found[key] = shard.get_tensor(key)
    return found


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Assert that two checkpoints have bitwise identical tensors and equal configurations."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
