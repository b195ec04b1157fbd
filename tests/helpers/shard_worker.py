"""Run by ``test_sharded_masks`` as one of two ranks: masks under FSDP2 and under DDP."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from tiny_models import tiny_llama
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from toy_training import ToyRamp, arguments, begin, sentences
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.distributed import DistributedConfig

import hf_optim
from hf_optim.errors import CheckpointError, ModelError, NumericalError
from hf_optim.runs.masking import require_equal_masks, stray_weights
from hf_optim.toolkit.distributed import collectives, fsdp
from hf_optim.toolkit.pruning import masks
from hf_optim.training.checkpoint_callback import CheckpointCallback, read_state
from hf_optim.training.mask_callback import MaskCallback
from hf_optim.training.nonfinite_callback import NonFiniteCallback

HOME = Path(sys.argv[1])
# 49 rows do not divide among two ranks.
ODD = {"intermediate_size": 49}
NAME = "model.layers.0.mlp.up_proj.weight"


def same_on_all(tensor: torch.Tensor) -> bool:
    gathered = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.equal(*gathered)


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


class Watch(TrainerCallback):
    def __init__(self, run) -> None:
        self.run, self.found, self.seen = run, [], 0

    def _look(self, *args, **kwargs) -> None:
        self.seen += 1
        self.found += stray_weights(self.run)

    on_step_begin = on_optimizer_step = on_step_end = _look


def train(how: str, sharded: bool, steps, **changes):
    """A stock Trainer on both ranks; FSDP2 is transformers' own, which shards at load time."""
    more = {"distributed_config": DistributedConfig(fsdp_size=2)} if sharded else {}
    model = AutoModelForCausalLM.from_pretrained(HOME / "dense", **more)
    assert isinstance(model.get_parameter(NAME), DTensor) is sharded
    model = hf_optim.optimize(model, steps)
    run = hf_optim.run_of(model)
    watch = Watch(run)
    callbacks = hf_optim.callbacks(model)
    settings = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "weight_decay": 0.1, **changes}
    trainer = Trainer(
        model=model,
        args=arguments(HOME / how, **settings),
        train_dataset=sentences(),
        callbacks=[*callbacks[:-1], watch, callbacks[-1]],
    )
    trainer.train()
    assert run.finished
    assert watch.seen == 12
    assert watch.found == []
    trainer.save_model(str(HOME / how / "final"))
    return model, run


def check_stock_trainer() -> None:
    """FSDP2 learns what DDP learns, under the same masks, and a plain model reads it."""
    once = [{"technique": "gmp", "sparsity": 0.6, "begin": 0, "end": 0}]
    for name, steps in {
        "once": once,
        "global": [{"technique": "gmp", "sparsity": 0.7, "initial": 0.3, "every": 1, "scope": "global"}],
    }.items():
        plain, ours = train(f"ddp-{name}", False, steps)
        found, run = train(f"fsdp-{name}", True, steps)
        for mask in run.masks.values():
            assert same_on_all(mask.byte())
        dist.barrier()
        read = AutoModelForCausalLM.from_pretrained(HOME / f"fsdp-{name}" / "final")
        parts = fsdp.FullWeights(found, [n for n, _ in found.named_parameters()])
        for key, weight in parts.items():
            assert torch.equal(read.get_parameter(key), weight), key
            if name == "once":  # a later choice may fall otherwise for the rounding of a sum
                torch.testing.assert_close(weight, plain.get_parameter(key).detach(), rtol=1e-3, atol=1e-5)
                assert key not in run.masks or torch.equal(run.masks[key], ours.masks[key].cpu()), key
            if key in run.masks:
                assert not weight[~run.masks[key]].any(), key
        share = run.reported(run.recipe.steps[0])["sparsity"]
        assert abs(share - (0.6 if name == "once" else 0.7)) < 0.001
        tensors = HOME / f"fsdp-{name}" / "checkpoint-2" / "hf_optim_masks.safetensors"
        assert tensors.is_file()


def check_magnitude() -> None:
    """A step that ranks once finds in shards what it finds in the whole."""
    plain = hf_optim.optimize(tiny_llama(**ODD), [{"technique": "magnitude", "scope": "global"}])
    found = hf_optim.optimize(shard(tiny_llama(**ODD)), [{"technique": "magnitude", "scope": "global"}])
    for name, mask in hf_optim.run_of(plain).masks.items():
        assert torch.equal(hf_optim.run_of(found).masks[name], mask)
        assert torch.equal(fsdp.full_tensor(found.get_parameter(name).detach()), plain.get_parameter(name))
    assert hf_optim.run_of(found).record.steps == hf_optim.run_of(plain).record.steps
    assert masks.parameter_has_nm_pattern(found, NAME, 4, 4)
    for ranking in (lambda w: masks.layer_masks({NAME: w}, 0.5), lambda w: masks.nm_mask(w, 2, 4)):
        try:
            ranking(found.get_parameter(NAME).detach())
        except ModelError as error:
            assert "train it with DDP" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a part was ranked as if it were all")


class Loop:
    """The events of a Trainer, made by hand: what a training loop of one's own calls."""

    def __init__(self, resume: Path | None = None) -> None:
        self.model = shard(tiny_llama(**ODD))
        self.step = ToyRamp()
        self.run = begin(self.model, self.step)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        self.keepers = [k for k in hf_optim.callbacks(self.model) if not hasattr(k, "stage")]
        self.args = SimpleNamespace(
            output_dir=str(HOME / "loop"), should_save=collectives.rank() == 0, resume_from_checkpoint=str(resume),
            fp16=False, load_best_model_at_end=False,
        )  # fmt: skip
        self.state = SimpleNamespace(global_step=0, max_steps=4)
        self.control = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
        if resume is not None:
            self.load(resume)
        self.call("on_train_begin")

    def call(self, event: str) -> None:
        for keeper in self.keepers:
            more = {"model": self.model, "optimizer": self.optimizer}
            getattr(keeper, event)(self.args, self.state, self.control, **more)

    def go(self, until: int) -> Loop:
        while self.state.global_step < until:
            self.call("on_step_begin")
            rows = sentences(seed=10 * self.state.global_step + collectives.rank())[:2]
            ids = torch.stack([row["input_ids"] for row in rows])
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.call("on_pre_optimizer_step")
            self.optimizer.step()
            self.call("on_optimizer_step")
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.call("on_step_end")
            assert stray_weights(self.run) == []
            with torch.no_grad():
                self.model(input_ids=ids)  # an evaluation, which leaves weights of the root gathered
        return self

    def save(self) -> Path:
        folder = HOME / "loop" / f"checkpoint-{self.state.global_step}"
        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = states.get_state_dict(self.model, self.optimizer, options=options)
        mine = distribute_tensor(torch.arange(5.0), self.model.get_parameter(NAME).device_mesh, [Shard(0)])
        self.run.state(self.step).scales = mine
        if self.args.should_save:
            folder.mkdir(parents=True)
            torch.save(found, folder / "states.pt")
        self.call("on_save")
        dist.barrier()
        return folder

    def load(self, folder: Path) -> None:
        model, optimizer = torch.load(folder / "states.pt")
        options = states.StateDictOptions(full_state_dict=True)
        states.set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options
        )
        self.state.global_step = int(folder.name.split("-")[1])


def check_resumption() -> None:
    whole = Loop().go(2)
    folder = whole.save()
    whole.go(4)
    again = Loop(folder)
    assert again.state.global_step == 2
    assert torch.equal(again.run.state(again.step).scales, torch.arange(5.0))  # gathered when it was saved
    again.go(4)
    assert again.run.masks.keys() == whole.run.masks.keys()
    assert len(whole.run.masks) == 6
    for name, mask in whole.run.masks.items():
        assert torch.equal(again.run.masks[name], mask)
        assert mask.shape == whole.model.get_parameter(name).shape
        assert not fsdp.full_tensor(whole.model.get_parameter(name).detach())[~mask].any()
    assert not isinstance(whole.model.lm_head.weight, DTensor)  # the evaluation left it gathered
    for loop in (whole, again):
        fsdp.reshard(loop.model)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter.to_local(), again.model.get_parameter(name).to_local()), name
    uneven = whole.model.get_parameter(NAME).to_local().shape[0]
    assert uneven == (25, 24)[collectives.rank()]
    other = begin(tiny_llama(), ToyRamp())
    try:
        read_state(other, folder)
    except CheckpointError as error:
        assert "masks of another model" in str(error)  # noqa: PT017
    else:
        raise AssertionError("masks of another shape were taken")


def check_guard() -> None:
    """What is not finite on one rank stops both."""
    loop = Loop()
    parameter = loop.model.get_parameter(NAME)
    local = torch.zeros_like(parameter.to_local())
    local[0, 0] = float("nan") if collectives.rank() else 1.0
    shape = {"shape": parameter.shape, "stride": parameter.stride()}
    parameter.grad = DTensor.from_local(local, parameter.device_mesh, parameter.placements, **shape)
    guard = next(k for k in loop.keepers if isinstance(k, NonFiniteCallback))
    try:
        guard.on_pre_optimizer_step(loop.args, loop.state, None, model=loop.model, optimizer=loop.optimizer)
    except NumericalError as error:
        assert "in step 1" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a rank went on")


def check_agreement() -> None:
    """Steps that draw another mask on each rank are found out."""
    run = begin(tiny_llama(), ToyRamp())
    generator = torch.Generator().manual_seed(0)
    run.masks[NAME] = torch.rand(run.model.get_parameter(NAME).shape, generator=generator) < 0.5
    require_equal_masks(run)
    if collectives.rank():
        run.masks[NAME] = run.masks[NAME].roll(1, 0)  # as many, elsewhere
    keepers: list = [CheckpointCallback(run), MaskCallback(run)]
    try:
        for keeper in keepers:
            keeper.on_save(
                SimpleNamespace(output_dir=str(HOME), should_save=False), SimpleNamespace(global_step=1), None
            )
    except NumericalError as error:
        assert NAME in str(error)  # noqa: PT017
    else:
        raise AssertionError("ranks with other masks went on")


def main() -> int:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    if collectives.rank() == 0:
        tiny_llama().save_pretrained(HOME / "dense")
    dist.barrier()
    for check in (check_magnitude, check_resumption, check_guard, check_agreement, check_stock_trainer):
        check()
        dist.barrier()
        if collectives.rank() == 0:
            print(check.__name__, flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
