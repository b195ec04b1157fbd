"""Iterative pruning: prune a part, retrain, and repeat until the sparsity is reached.

Three techniques differ in what they restore between the rounds, and all use the class of this module. It also serves
your own training loop::

    model = AutoModelForCausalLM.from_pretrained("org/model", optim_config="lottery80")
    rounds = Rounds(hf_optim.run_of(model))  # those of the recipe's step
    rounds.point("out/rewind-0", optimizer)
    train(model, optimizer, scheduler)
    while rounds.left:
        rounds.next()                # 1 - 0.2^(r / n) of the weights are zero now
        rounds.rewind(optimizer)     # the others are back at the rewind checkpoint
        rounds.restart(scheduler)    # and so is the learning rate
        train(model, optimizer, scheduler)  # with rounds.keep() after each optimizer.step()
    rounds.finish()                  # completes the recipe's stage
    model.save_pretrained("out/sparse")
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME

from ..checkpoints.atomic import replace_directory
from ..errors import CheckpointError, ModelError, OptimError, RecipeError
from ..lifecycle.stages import end_training
from ..recipes.technique import Technique
from ..runs import distributed, training_watch
from ..runs.masking import apply_masks
from ..runs.run import Run
from ..toolkit.distributed.fsdp import has_sharded_parameters
from ..toolkit.pruning import masks
from ..toolkit.pruning.rewinding import copy_state_, reinitialized_copy, require_lambda_lr, seek_scheduler_
from ..toolkit.pruning.rounds import ROUNDS, round_sparsity
from ..toolkit.topology import require_layers, unprunable_experts
from ..trust.files import require_regular
from .checkpoint_callback import write_state
from .saved_weights import load_saved


class Rounds:
    """The rounds of one iterative pruning: shrinking masks, and a rewind checkpoint.

    Attributes:
        run: the run whose masks shrink.
        step: the recipe's step, whose ``run.state`` holds the progress; None without one.
        sparsity: fraction of the weights that is zero after the last round.
        rounds: their number.
        parameters: names of the weights that are pruned: of parameters, and of matrices of experts (see
            ``toolkit.pruning.matrices``).
        home: the folder of rewind checkpoints whose path is relative.
    """

    def __init__(
        self,
        run: Run,
        *,
        sparsity: float | None = None,
        rounds: int | None = None,
        scope: str | None = None,
        targets: Iterable[str] | None = None,
        skip: Iterable[str] | None = None,
        step: Technique | None = None,
    ) -> None:
        """Choose what is pruned; nothing changes yet.

        If the recipe has a step that prunes in rounds, arguments that are left out are those of the step.

        Args:
            run: ``hf_optim.run_of(model)``.
            sparsity: fraction of the weights to remove in total, in [0, 1).
            rounds: number of rounds, each of which removes the same fraction of the remaining weights.
            scope: ``"layer"`` ranks within each layer, ``"global"`` across all of them.
            targets, skip: which linear layers, and which of them not.
            step: the recipe's step; None takes the one that prunes in rounds, if there is one.

        Raises ``ModelError`` if no layer is left, and ``RecipeError`` for an argument that contradicts the step, or
        that is given by neither the step nor the caller.
        """
        if step is None:
            found = [one for one in run.recipe.steps if ROUNDS in one.contract().owns]
            step = found[0] if len(found) == 1 else None
        self.run, self.step = run, step
        self.label = run.label(step) if step is not None else "rounds"
        self.sparsity: float = self._resolve("sparsity", sparsity)
        self.rounds: int = self._resolve("rounds", rounds)
        self.scope: str = self._resolve("scope", scope, "layer")
        targets = self._resolve("targets", targets if targets is None else tuple(targets), ("Linear",))
        skip = self._resolve("skip", skip if skip is None else tuple(skip), ())
        training_watch.unwatch(run.model)  # a loop with rounds keeps the masks
        layers = run.select(targets, skip, embeddings=True, experts=True)
        require_layers(layers, run.model, self.label)
        names = masks.weight_names(layers)
        self.parameters = list(names.values())
        if step is not None:
            run.cover(step, names, unprunable_experts(run.model, targets, skip))
        self.home = Path()
        self.state = run.state(step) if step is not None else SimpleNamespace()
        if not hasattr(self.state, "done"):
            self.reset()

    def _resolve(self, name: str, given: Any, default: Any = None) -> Any:
        """Return the given value, else the step's, else the default."""
        if self.step is not None and ROUNDS in self.step.contract().owns:
            own = getattr(self.step, name)
            if given is not None and given != own:
                raise RecipeError(
                    f"{self.label} has {name}={own!r}, and Rounds was given {given!r}: leave {name} out, or change the "
                    "recipe"
                )
            return own
        if given is None and default is None:
            raise RecipeError(f"{self.label}: give Rounds its {name}, which no step of the recipe has")
        return default if given is None else given

    def reset(self) -> None:
        """Restart the count of rounds. Masks stay."""
        self.state.done, self.state.sparsities = 0, []
        self.state.point, self.state.point_sha256 = None, None
        self.state.optimizer_sha256 = None

    @property
    def done(self) -> int:
        """The number of rounds that have begun."""
        return self.state.done

    @property
    def left(self) -> int:
        """The number of remaining rounds."""
        return self.rounds - self.done

    @property
    def active(self) -> bool:
        """True while the stage of the step is the current one."""
        stage = self.run.stage
        return self.step is None or (stage is not None and any(step is self.step for step in stage.steps))

    def next(self) -> float:
        """Prune the smallest remaining weights for the next round, and return the sparsity over all targets."""
        if not self.left:
            raise OptimError(f"{self.label}: all {self.rounds} rounds are done")
        weights = masks.MatrixWeights(self.run.model, self.parameters)
        masks.require_finite(weights, self.label)
        rank = masks.layer_masks if self.scope == "layer" else masks.global_masks
        share = round_sparsity(self.sparsity, self.done + 1, self.rounds)
        masks.prune_(self.run.model, self.run.masks, rank(weights, share, self.run.masks))
        kept = [masks.MaskParts(self.run.masks)[name] for name in self.parameters]
        reached = 1.0 - sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)
        self.state.done += 1
        self.state.sparsities = [*self.state.sparsities, round(reached, 6)]
        return reached

    # -- the rewind checkpoint ------------------------------------------------------------------------------------
    def point(self, folder: str | Path, optimizer: Any = None, write: bool | None = None) -> None:
        """Write the rewind checkpoint atomically: an ordinary checkpoint with the optimizer's state and the masks.

        Args:
            folder: where to write; existing content is replaced.
            optimizer: the optimizer whose current state ``rewind`` restores.
            write: True if this rank writes; by default rank 0 does.
        """
        self.require_whole()
        folder = Path(folder)
        if distributed.is_main() if write is None else write:
            with replace_directory(folder, stale=lambda name: True) as beside:
                self.run.model.save_pretrained(beside)
                if optimizer is not None:
                    torch.save(optimizer.state_dict(), beside / OPTIMIZER_NAME)
                write_state(self.run, beside, {})
        distributed.barrier()
        inside = folder.is_relative_to(self.home)
        self.state.point = str(folder.relative_to(self.home) if inside else folder.absolute())
        self.state.point_sha256 = _digest(folder)
        self.state.optimizer_sha256 = _digest(folder, OPTIMIZER_NAME)

    def require_whole(self) -> None:
        """Raise ``ModelError`` for sharded parameters: masks support them, rewinding does not."""
        model = self.run.model
        if has_sharded_parameters(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ModelError(
                f"{self.label}: weights are rewound as a whole: train on one device or with DDP, not with sharded "
                "parameters (FSDP, ZeRO-3), or take a technique that does not rewind weights"
            )

    def find_point(self) -> Path:
        """Return the folder of the rewind checkpoint. Raises ``CheckpointError`` if it is missing or was replaced."""
        if self.state.point is None:
            raise CheckpointError(
                f"{self.label}: there is no rewind checkpoint yet: call point(folder) before rewind()"
            )
        folder = self.home / self.state.point
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{self.label}: the rewind checkpoint {folder} is missing: restore the folder that the training wrote "
                "next to its checkpoints, or train again from the beginning"
            )
        require_regular(folder)
        if _digest(folder) != self.state.point_sha256:
            raise CheckpointError(
                f"{self.label}: the rewind checkpoint {folder} is not the one that this training wrote: "
                "give each training its own output_dir, or train again from the beginning"
            )
        return folder

    def rewind(self, optimizer: Any = None) -> None:
        """Restore weights (and the optimizer's state, if given) from the rewind checkpoint, under the current masks."""
        folder = self.find_point()
        copy_state_(self.run.model, self._stored(folder))
        if optimizer is not None:
            if not (folder / OPTIMIZER_NAME).is_file():
                raise CheckpointError(f"{self.label}: the rewind checkpoint {folder} has no {OPTIMIZER_NAME}")
            # It is a pickle: only the file that this training wrote is opened. Earlier versions recorded no hash.
            if getattr(self.state, "optimizer_sha256", None) not in (None, _digest(folder, OPTIMIZER_NAME)):
                raise CheckpointError(
                    f"{self.label}: {OPTIMIZER_NAME} of the rewind checkpoint {folder} is not the one that this "
                    "training wrote: train again from the beginning"
                )
            state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state)
        apply_masks(self.run)

    def _stored(self, folder: Path) -> Any:
        model = self.run.model
        # The dtype that holds the values of all parameters exactly.
        dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
        return load_saved(model, folder, dtype=dtype)

    def reinitialize(self, seed: int = 0, optimizer: Any = None) -> None:
        """Reinitialize all weights as the model's class does, under the current masks; clear the optimizer's state."""
        self.require_whole()
        copy_state_(self.run.model, reinitialized_copy(self.run.model, seed))
        if optimizer is not None:
            optimizer.state.clear()
        apply_masks(self.run)

    # -- around them ----------------------------------------------------------------------------------------------
    def restart(self, scheduler: Any, position: int = 0) -> None:
        """Set the schedule to ``position``. Raises ``RecipeError`` for a scheduler that is not a ``LambdaLR``."""
        seek_scheduler_(require_lambda_lr(scheduler, self.label), position)

    def keep(self) -> None:
        """Zero the pruned weights: call it after each optimizer step of your own training loop."""
        apply_masks(self.run)

    def finish(self) -> None:
        """Complete the training stage after your own training loop, and continue with the recipe."""
        if self.run.stage is not None:
            end_training(self.run)


def _digest(folder: Path, pattern: str = "*.safetensors") -> str:
    """Return a hash of the files of a rewind checkpoint that match ``pattern``, in hex."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()
