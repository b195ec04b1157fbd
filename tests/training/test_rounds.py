"""Pruning in rounds: how training is divided, the schedule that starts again, rewind checkpoints, and resumption."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from conftest import HELPERS
from round_worker import Rewinder, rounds_of
from tiny_models import tiny_llama
from toy_training import arguments, begin, sentences
from transformers import EarlyStoppingCallback, LlamaForCausalLM, Trainer, TrainerCallback, get_scheduler

import hf_optim
from hf_optim import CheckpointError, ModelError, OptimError, RecipeError, Rounds, run_of
from hf_optim.toolkit.pruning import masks
from hf_optim.toolkit.pruning.rounds import RetrainingPhases, round_sparsity

WORKER = HELPERS / "round_worker.py"


class Rates(TrainerCallback):
    """The learning rate of every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])


def train(folder, steps=14, step=None, model=None, resume=None, data=None, callbacks=(), more=None, **changes):
    model = model or tiny_llama()
    if step is not None:
        begin(model, step)
    rates = Rates()
    trainer = Trainer(
        model=model,
        args=arguments(folder, max_steps=steps, **changes),
        train_dataset=data or sentences(),
        callbacks=[*(hf_optim.callbacks(model) if step is not None else ()), rates, *callbacks],
        **(more or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, rates.seen, trainer


def same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# -- dividing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rewind_to", [0, 7, 0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_phases_are_the_longest_that_fit(rounds, dense, rewind_to):
    for steps in range(400, 440):
        found = RetrainingPhases.divide(steps, rounds, dense, rewind_to)
        k = rewind_to if isinstance(rewind_to, int) else round(rewind_to * found.length)
        used = dense * found.length + rounds * (found.length - k)
        assert found.rewind_step == k
        assert used <= steps
        longer = found.length + 1
        longer_k = rewind_to if isinstance(rewind_to, int) else round(rewind_to * longer)
        assert dense * longer + rounds * (longer - longer_k) > steps
        begins = [found.round_start(number) for number in range(1, rounds + 1)]
        assert begins[0] == dense * found.length
        assert [step for step in range(steps + 1) if found.round_at(step)] == begins
        assert found.fits()
        assert found.rounds_that_fit == rounds


def test_fractions_compound_to_the_target_exactly():
    for sparsity in (0.0, 0.1, 0.5, 0.9, 0.99):
        shares = [round_sparsity(sparsity, number, 7) for number in range(8)]
        assert shares[0] == 0.0
        assert shares[7] == sparsity
        left = [1 - share for share in shares]
        assert all(b / a == pytest.approx(left[1]) for a, b in itertools.pairwise(left))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_round_removes_the_exact_count(scope):
    model = tiny_llama()
    rounds = Rounds(begin(model, Rewinder()), sparsity=0.7, rounds=4, scope=scope, skip=["*.q_proj"])
    seen = {}
    for number in range(1, 5):
        reached = rounds.next()
        found = run_of(model).masks
        assert not any("q_proj" in name or "lm_head" in name for name in found)
        share = round_sparsity(0.7, number, 4)
        sizes = [mask.numel() for mask in found.values()]
        gone = [int((~mask).sum()) for mask in found.values()]
        if scope == "layer":
            assert gone == [masks.removed_count(size, share) for size in sizes]
        else:
            assert sum(gone) == masks.removed_count(sum(sizes), share)
        assert reached == pytest.approx(share, abs=1e-3)
        assert all(not (mask & ~seen.get(name, mask)).any() for name, mask in found.items())
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in found.items())
        seen = dict(found)
    assert rounds.left == 0
    with pytest.raises(OptimError, match="all 4 rounds are done"):
        rounds.next()


# -- the learning rate -----------------------------------------------------------------------------------------------
SCHEDULES = {
    "linear": {"lr_scheduler_type": "linear", "warmup_steps": 2},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 0.3},
    "constant": {"lr_scheduler_type": "constant"},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-4, "power": 2.0}},
    "stable": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 2, "min_lr_ratio": 0.1},
    },
}


@pytest.mark.many
@pytest.mark.parametrize("kind", SCHEDULES)
def test_retraining_has_the_learning_rates_of_the_original(tmp_path, kind):
    """A dense phase of 6 steps, two rounds of its steps 2..5, and one step that is left over."""
    _, original, _ = train(tmp_path / "a", 6, **SCHEDULES[kind])
    assert len(original) == 6
    _, found, _ = train(tmp_path / "b", 15, Rewinder(rounds=2, rewind_to=2), **SCHEDULES[kind])
    assert found == [*original, *original[2:], *original[2:], original[-1]]


def test_without_a_dense_phase_the_first_round_begins_at_once(tmp_path):
    _, original, _ = train(tmp_path / "a", 8, warmup_steps=3)
    model, found, _ = train(
        tmp_path / "b", 12, Rewinder(rounds=2, rewind_to=2, dense=False, weights="keep"), warmup_steps=3
    )
    assert found == original[2:] * 2
    assert run_of(model).state(run_of(model).recipe.steps[0]).done == 2


def test_retraining_at_one_rate(tmp_path):
    _, original, _ = train(tmp_path / "a", 4)
    _, found, _ = train(tmp_path / "b", 12, Rewinder(rounds=2, weights="keep", rate=0.2))
    assert found == [*original, *[1e-2 * 0.2] * 8]


def test_a_schedule_of_the_callers_own_is_that_of_one_phase(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    _, found, _ = train(
        tmp_path, 8, Rewinder(rounds=1, weights="keep"), model=model, more={"optimizers": (optimizer, scheduler)}
    )
    assert found == [0.1 / (1 + step) for step in (0, 1, 2, 3)] * 2


def test_a_schedule_without_positions_is_refused(tmp_path):
    with pytest.raises(
        RecipeError, match=r"step 1 \(toy_rewinder\): a ReduceLROnPlateau cannot return to an earlier step"
    ):
        train(
            tmp_path,
            step=Rewinder(),
            data=sentences(),
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps",
            eval_steps=5,
            more={"eval_dataset": sentences(4)},
        )


# -- rewind checkpoints ------------------------------------------------------------------------------------------------
class Keep(TrainerCallback):
    """Weights and optimizer state after some steps; comes after the callbacks of the run."""

    def __init__(self, *steps):
        self.steps, self.weights, self.moments = steps, {}, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}
            self.moments[state.global_step] = {
                n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in model.named_parameters() if p in optimizer.state
            }


def test_weights_and_optimizer_go_back_under_the_masks(tmp_path):
    keep = Keep(2, 6, 10)
    model, _, _ = train(tmp_path, 14, Rewinder(rounds=2, rewind_to=2), callbacks=[keep])
    run = run_of(model)
    at = keep.weights
    first = {name: masks.removed_count(mask.numel(), round_sparsity(0.5, 1, 2)) for name, mask in run.masks.items()}
    for name, early in at[2].items():
        for step in (6, 10):
            assert torch.equal(keep.moments[step][name], keep.moments[2][name])
            mask = at[step][name] != 0 if name in run.masks else torch.ones_like(early, dtype=torch.bool)
            assert torch.equal(at[step][name], early * mask)
        if name in run.masks:
            assert int((at[6][name] == 0).sum()) == first[name]
            assert torch.equal(at[10][name] != 0, run.masks[name])
    point = tmp_path / "rewind-2"
    stock = LlamaForCausalLM.from_pretrained(point)
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, at[2][name])
    found = {path.name for path in point.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "hf_optim_masks.safetensors", "config.json"} <= found
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.many
@pytest.mark.parametrize("at", [8, 9])
@pytest.mark.parametrize("step", [{"rewind_to": 2}, {"weights": "draw"}, {"weights": "keep", "rate": 0.1}], ids=str)
def test_resumed_training_ends_with_the_same_bits(tmp_path, step, at):
    """From the first step of the second round (8) or from inside it; the point lies before either."""
    fields = {"rounds": 2, "rewind_to": 0, **step}
    saving = {"save_strategy": "steps", "save_steps": 1, "warmup_steps": 1}
    steps = 14 if fields["rewind_to"] else 12
    begun = RetrainingPhases.divide(steps, 2, True, fields["rewind_to"]).round_start(2) - 8
    whole, rates, _ = train(tmp_path, steps, Rewinder(**fields), **saving)
    resumed = str(tmp_path / f"checkpoint-{at + begun}")
    again, later, _ = train(tmp_path, steps, Rewinder(**fields), resume=resumed, model=tiny_llama(seed=1), **saving)
    assert later == rates[at + begun :]
    same(again, whole)
    ours, theirs = run_of(again), run_of(whole)
    assert all(torch.equal(ours.masks[name], mask) for name, mask in theirs.masks.items())
    assert vars(ours.state(ours.recipe.steps[0])) == vars(theirs.state(theirs.recipe.steps[0]))


def test_resuming_before_a_round_needs_the_point_of_this_training(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, 12, Rewinder(rounds=2), **saving)
    resume = {"step": Rewinder(rounds=2), "resume": str(tmp_path / "checkpoint-6"), **saving}
    with pytest.raises(CheckpointError, match=r"is of a training of 12 steps, .* one of 20"):
        train(tmp_path, 20, **resume)
    point = tmp_path / "rewind-0"
    kept = point.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"step 1 \(toy_rewinder\): the rewind checkpoint .*rewind-0 is missing"):
        train(tmp_path, 12, **resume)
    tiny_llama(seed=5).save_pretrained(point)
    with pytest.raises(CheckpointError, match=r"rewind-0 is not the one that this training wrote"):
        train(tmp_path, 12, **resume)
    shutil.rmtree(point)
    kept.rename(point)
    torch.save({}, point / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt of .*rewind-0 is not the one that this training wrote"):
        train(tmp_path, 12, **resume)
    (point / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"rewind-0 has no optimizer\.pt"):
        train(tmp_path, 12, **resume)


def test_a_checkpoint_of_the_last_round_needs_no_point(tmp_path):
    whole, _, _ = train(tmp_path, 12, Rewinder(rounds=2), save_strategy="steps", save_steps=9)
    shutil.rmtree(tmp_path / "rewind-0")
    again, _, _ = train(tmp_path, 12, Rewinder(rounds=2), resume=str(tmp_path / "checkpoint-9"))
    same(again, whole)


# -- a loop of one's own ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["rewind", "keep", "draw"])
def test_a_loop_by_hand_ends_where_the_trainer_does(tmp_path, weights):
    data = sentences(6)
    expected, _, _ = train(
        tmp_path / "a", 7, Rewinder(rounds=2, rewind_to=1, weights=weights, scope="global"), data=data,
        train_sampling_strategy="sequential", max_grad_norm=0.0, weight_decay=0.1, warmup_steps=2, adam_epsilon=1e-3,
    )  # fmt: skip

    model = tiny_llama()
    run = begin(model, step := Rewinder())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2, eps=1e-3
    )
    scheduler = get_scheduler("linear", optimizer, 2, 3)
    rounds = Rounds(run, sparsity=0.5, rounds=2, scope="global", step=step)
    batches = iter([data[2 * i : 2 * i + 2] for i in range(3)] * 3)

    def steps(count):
        model.train()
        for batch in [next(batches) for _ in range(count)]:
            model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rounds.keep()

    steps(1)
    rounds.point(tmp_path / "point", optimizer)
    steps(2)
    while rounds.left:
        rounds.next()
        if weights == "rewind" or (weights == "draw" and rounds.left):
            rounds.rewind(optimizer)
        elif weights == "draw":
            rounds.reinitialize(0, optimizer)
        rounds.restart(scheduler, 1)
        steps(2)
    rounds.finish()
    assert run.finished
    assert run.masks.keys() == run_of(expected).masks.keys()
    assert all(torch.equal(run.masks[name], mask) for name, mask in run_of(expected).masks.items())
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda found, name=name: f"{name}: {found}")


def test_rewinding_without_a_point_is_an_error():
    rounds = Rounds(begin(tiny_llama(), Rewinder()), sparsity=0.5, rounds=2)
    with pytest.raises(CheckpointError, match=r"no rewind checkpoint yet: call point\(folder\)"):
        rounds.rewind()


def test_a_model_in_half_precision_with_single_norms_comes_back_exactly(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.model.norm.float()
    with torch.no_grad():
        model.model.norm.weight += 1e-4
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounds = Rounds(begin(model, Rewinder()), sparsity=0.5, rounds=2)
    rounds.point(tmp_path / "point")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    random = torch.random.get_rng_state()
    rounds.rewind()
    assert torch.equal(random, torch.random.get_rng_state())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


# -- what goes wrong -------------------------------------------------------------------------------------------------
def test_rounds_that_do_not_fit_are_said_at_the_start(tmp_path, caplog):
    reached = round_sparsity(0.5, 2, 4)
    model, _, _ = train(tmp_path, 3, Rewinder(rounds=4))
    assert f"room for 2 of 4 rounds: the model reaches a sparsity of {reached:.4f} instead" in caplog.text
    run = run_of(model)
    assert rounds_of(run).done == 2
    assert any("room for 2 of 4" in note for note in run.record.notes)
    with pytest.raises(RecipeError, match="3 steps has no room for a round of retraining after 5 steps"):
        train(tmp_path, 3, Rewinder(rounds=1, rewind_to=4))


def test_a_warm_up_longer_than_a_phase_is_said(tmp_path, caplog):
    train(tmp_path, 8, Rewinder(rounds=1), warmup_steps=5)
    assert "a warm-up of 5 steps does not end within a phase of 4" in caplog.text


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    begin(model, Rewinder())
    callbacks = hf_optim.callbacks(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], r=2))
    trainer = Trainer(model=wrapped, args=arguments(tmp_path), train_dataset=sentences(), callbacks=callbacks)
    with pytest.raises(ModelError, match=r"step 1 \(toy_rewinder\): .* without adapters"):
        trainer.train()


class Worsening(TrainerCallback):
    """Makes every evaluation worse than those before it."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def test_the_best_checkpoint_is_one_of_the_last_round(tmp_path):
    """The dense model of the first step is the best of all; the result is sparse all the same."""
    data = sentences(8)
    model, _, trainer = train(
        tmp_path, 9, Rewinder(rounds=2), data=data, callbacks=[Worsening()],
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        more={"eval_dataset": data},
    )  # fmt: skip
    assert trainer.state.best_global_step == 6
    assert rounds_of(run_of(model)).done == 2
    for name, parameter in LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6").named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    for name, mask in run_of(model).masks.items():
        assert int((model.get_parameter(name) == 0).sum()) == masks.removed_count(mask.numel(), 0.5)


def test_stopping_early_ends_in_the_round_it_is_in(tmp_path):
    data = sentences(8)
    model, rates, _ = train(
        tmp_path, 30, Rewinder(rounds=2, weights="keep"), data=data, learning_rate=1.0, lr_scheduler_type="constant",
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False,
        more={"eval_dataset": data}, callbacks=[EarlyStoppingCallback(4)],
    )  # fmt: skip
    assert len(rates) < 30
    assert run_of(model).finished
    assert rounds_of(run_of(model)).done < 2


@pytest.mark.slow
def test_two_ranks_rewind_to_one_point(tmp_path, python):
    done = python.ranks(WORKER, tmp_path)
    assert done.status == 0, done.err[-3000:]
    assert done.out.count("agreed") == 2
