"""A training resumes from all of the weights that it saved, under whatever names, or the checkpoint is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from renamed_families import build_family
from safetensors.torch import load_file, save_file
from toy_training import ToyRamp, arguments, begin
from transformers import Trainer

import hf_optim
from hf_optim import CheckpointError
from hf_optim.training.saved_weights import load_saved
from hf_optim.training.trainer import OptimTrainer

FAMILIES = {"vit": "pixel_values", "mixtral": "input_ids"}
TRAINERS = {"stock": Trainer, "ours": OptimTrainer}


def rows(family):
    draw = torch.Generator().manual_seed(3)
    if family == "vit":
        return [{"pixel_values": torch.randn(3, 16, 16, generator=draw), "labels": i % 2} for i in range(8)]
    ids = torch.randint(10, 128, (8, 12), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(kind, family, folder, **changes):
    model, _ = build_family(family)
    begin(model, ToyRamp())
    callbacks = hf_optim.callbacks(model) if TRAINERS[kind] is Trainer else None
    args = arguments(folder, max_steps=4, learning_rate=0.01, **changes)
    return TRAINERS[kind](
        model=model, args=args, train_dataset=rows(family), eval_dataset=rows(family), callbacks=callbacks
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One training for each family, with a checkpoint after every second step."""
    found = {}
    for family in FAMILIES:
        home = tmp_path_factory.mktemp(family)
        trainer = trainer_of("ours", family, home, save_strategy="steps", save_steps=2)
        trainer.train()
        found[family] = home, {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return found


@pytest.mark.many(every=4)
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_training_ends_with_the_same_weights(family, kind, trained, tmp_path):
    home, weights = trained[family]
    trainer = trainer_of(kind, family, tmp_path, save_strategy="no", resume_from_checkpoint=str(home / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=str(home / "checkpoint-2"))
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_best_weights_come_back_under_their_names(kind, tmp_path):
    saving = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = trainer_of(kind, "vit", tmp_path, **saving, load_best_model_at_end=True)
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", True  # the first is the best
    trainer.train()
    best = trainer.state.best_model_checkpoint
    wanted = load_saved(trainer.model, tmp_path / best.rpartition("/")[2]).state_dict()
    assert best.endswith("checkpoint-2")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def change(state, key, to):
    if to is None:
        del state[key]
    else:
        state[key] = to(state[key])


DAMAGES = {
    "lost": None,
    "integers": lambda tensor: (tensor * 100).to(torch.int8),
    "fp8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "half": lambda tensor: tensor[: len(tensor) // 2].clone(),
}
KEYS = {
    "vit": "vit.encoder.layer.1.attention.attention.query.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w1.weight",
}


@pytest.mark.many
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("family", "key"), [*KEYS.items(), ("mixtral", "model.norm.weight")])
def test_a_damaged_checkpoint_is_refused_by_name(family, key, damage, kind, trained, tmp_path):
    if kind == "stock" and (key, damage) == ("model.norm.weight", "half"):
        pytest.skip("a stock Trainer raises its own error before a callback is called")
    folder = shutil.copytree(trained[family][0] / "checkpoint-2", tmp_path / "checkpoint-2")
    state = load_file(folder / "model.safetensors")
    change(state, key, DAMAGES[damage])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    trainer = trainer_of(kind, family, tmp_path / "out", save_strategy="no", resume_from_checkpoint=str(folder))
    with pytest.raises(CheckpointError, match=r"norm|layers?\.1\.|layers\.1\."):
        trainer.train(resume_from_checkpoint=str(folder))


@pytest.mark.many(every=4)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_after_a_recipe_resumes_from_all_weights_too(family, tmp_path):
    def trainer(**changes):
        model, _ = build_family(family)
        hf_optim.optimize(model, [{"technique": "magnitude", "sparsity": 0.5}])
        saving = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
        args = arguments(tmp_path, max_steps=4, learning_rate=0.01, **saving, **changes)
        return OptimTrainer(model=model, args=args, train_dataset=rows(family), eval_dataset=rows(family))

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, whole.model.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)
    best = trainer(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    wanted = load_saved(best.model, tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in best.model.state_dict().items())
