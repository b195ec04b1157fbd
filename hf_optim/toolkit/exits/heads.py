"""The exits of one model: heads, and what decides where to stop."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...trust.bounds import shown
from .settings import ExitSettings
from .structure import Structure, find_structure, float_dtype
from .views import StandIn, list_with, view


class ExitHeads(nn.Module):
    """The exits of a model, numbered from 0; the last one, ``count - 1``, is the model itself.

    Attributes:
        settings: where they are.
        structure: of the model.
        own: for ``heads: own``, the copies of final norm and head of each early exit, by their names in the model with
            ``/`` for the dots; and, for a model without a head, a ``projection`` that starts as the identity.
        classifier: what decides where to stop: a linear layer from the state after the first exit's block to ``count``
            logits (``multinomial``), one to a logit for each early exit (``geometric``), or None.
    """

    def __init__(self, model: nn.Module, settings: ExitSettings, structure: Structure | None = None) -> None:
        super().__init__()
        structure = find_structure(model) if structure is None else structure
        _require_places(model, settings, structure)
        self.settings, self.structure = settings, structure
        self.own = nn.ModuleList()
        if settings.heads == "own":
            self.own.extend(_copies(model, structure) for _ in settings.layers)
        self.classifier: nn.Module | None = None
        if settings.classifiers != "none":
            self.classifier = _classifier(settings, structure.width)
            self.classifier.to(next(model.parameters()).device)
        self.bind(model)

    def bind(self, model: nn.Module) -> None:
        """Let the exits be those of this model, which they refer to weakly."""
        vars(self)["_model"] = weakref.ref(model)
        vars(self)["_plain"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_plain": None}

    @property
    def model(self) -> Any:
        """The model. Raises ``ModelError`` if it was deleted."""
        found = vars(self)["_model"]
        found = found() if found is not None else None
        if found is None:
            raise ModelError("the model of these exits was deleted, or they were copied alone: attach exits to a model")
        return found

    @property
    def count(self) -> int:
        """Exits with the last one."""
        return self.settings.count

    @property
    def layers(self) -> tuple[int, ...]:
        """Index of the block that each exit sits after; the last is that of the last block."""
        return (*self.settings.layers, self.structure.blocks - 1)

    def listed(self) -> nn.Module:
        """Return the model's list of blocks. Raises ``ModelError`` if its number has changed."""
        found: nn.Module = self.model.get_submodule(self.structure.list_name)
        if len(found._modules) != self.structure.blocks:
            raise ModelError(
                f"the exits were made for {self.structure.blocks} blocks, and {type(self.model).__name__} now has "
                f"{len(found._modules)}: attach exits again"
            )
        return found

    def require_index(self, exit_index: int) -> int:
        """Return the number of an exit. Raises ``ModelError`` if there is none with it."""
        if not isinstance(exit_index, int) or isinstance(exit_index, bool) or not 0 <= exit_index < self.count:
            raise ModelError(
                f"exit {shown(exit_index)} does not exist: the model has exits 0 to {self.count - 1}, after blocks "
                f"{', '.join(map(str, self.layers))}"
            )
        return exit_index

    def head_modules(self, exit_index: int) -> dict[str, nn.Module]:
        """Return the modules that an exit has in place of the model's, by their names in the model."""
        if exit_index == self.count - 1 or not len(self.own):
            return {}
        made: Any = self.own[exit_index]
        return {name.replace("/", "."): module for name, module in made.items() if name != "projection"}

    def head_input(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Return what the final norm reads at an exit: the hidden state, or its projection."""
        if exit_index == self.count - 1 or not len(self.own):
            return hidden
        made: Any = self.own[exit_index]
        return made["projection"](hidden) if "projection" in made else hidden

    def output(self, exit_index: int, hidden: Tensor, **inputs: Any) -> Any:
        """Return the model's output, with its loss if there are labels, for the hidden state after an exit's block.

        Args:
            exit_index: the exit.
            hidden: ``[batch, tokens, width]``.
            inputs: what the model's forward takes for this batch: heads read masks, token ids and labels.
        """
        model, index = self.model, self.require_index(exit_index)
        self.follow(hidden)
        given = self.head_input(index, hidden)
        listed = self.listed()
        blocks: list[Any] = list(listed._modules.values())
        *passed, last = blocks
        members = [StandIn(block, self.structure.values) for block in passed]
        members.append(StandIn(last, self.structure.values, given))
        changes = {self.structure.list_name: list_with(listed, members), **self.head_modules(index)}
        return view(model, changes)(**inputs)

    def logits(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Return the logits of a language model for hidden states after an exit's block.

        Args:
            exit_index: the exit.
            hidden: ``[..., width]``; each position is read alone.

        Returns:
            ``[..., vocabulary]``. At the last exit, what the model computes, to the bit.
        """
        index = self.require_index(exit_index)
        self.follow(hidden)
        if self._is_plain():
            own, model = self.head_modules(index), self.model
            hidden = self.head_input(index, hidden)
            for name in self.structure.tail:
                hidden = own[name](hidden) if name in own else model.get_submodule(name)(hidden)
            return hidden
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=hidden.device)
        found = self.output(index, rows, input_ids=ids, use_cache=False)
        if getattr(found, "logits", None) is None or found.logits.dim() != 3:
            raise ModelError(
                f"{type(self.model).__name__} has no logits for each token: call output(exit_index, hidden, **inputs)"
            )
        return found.logits.reshape(*hidden.shape[:-1], -1)

    def stop_logits(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Return the classifier's logits in float32.

        ``multinomial``: over all exits, ``[..., count]``; its hidden state is that of the first exit. ``geometric``:
        of stopping at this early exit, ``[...]``, for the sigmoid.
        """
        self.require_index(exit_index)
        if self.classifier is None:
            raise ModelError("these exits have no classifier: attach exits with classifiers sequence or token")
        self.follow(hidden)
        if isinstance(self.classifier, nn.ModuleList):
            if exit_index == self.count - 1:
                raise ModelError("the last exit has no classifier: every row and token stops there")
            return self.classifier[exit_index](hidden.float()).squeeze(-1)
        return self.classifier(hidden.float())

    def follow(self, hidden: Tensor) -> None:
        """Move the weights of the exits to where a hidden state is; own heads have the dtype of the model."""
        mine = next(self.parameters(), None)
        if mine is not None and mine.device != hidden.device:
            self.to(hidden.device)
        mine = next(self.own.parameters(), None)
        if mine is not None and mine.dtype != (wanted := float_dtype(self.model)):
            self.own.to(wanted)

    def _is_plain(self) -> bool:
        """Return True if the modules after the last block, one after the other, are all that a language model does.

        Others cap or scale logits. It is tried once, and compared to the bit.
        """
        if vars(self)["_plain"] is None:
            vars(self)["_plain"] = False  # the comparison itself takes the other way
            model = self.model
            if model.get_output_embeddings() is not None and self.structure.tail:
                with torch.no_grad():
                    probe = _probe(model, self.structure.width)
                    expected = self.logits(self.count - 1, probe)
                    found = probe
                    for name in self.structure.tail:
                        found = model.get_submodule(name)(found)
                    vars(self)["_plain"] = found.shape == expected.shape and torch.equal(found, expected)
        return vars(self)["_plain"]


def _probe(model: nn.Module, width: int) -> Tensor:
    weight = next(p for p in model.parameters() if p.is_floating_point())
    wave = torch.arange(3 * width, dtype=torch.float32).sin().reshape(3, width) * 50
    return wave.to(device=weight.device, dtype=weight.dtype)


def _require_places(model: nn.Module, settings: ExitSettings, structure: Structure) -> None:
    name, last = type(model).__name__, structure.blocks - 1
    for layer in settings.layers:
        if layer > last:
            raise ModelError(f"there is no block {layer} in {name}, whose {structure.blocks} blocks are 0 to {last}")
        if layer == last:
            raise ModelError(
                f"block {layer} is the last of {name}, and the exit after it is the model itself: leave it out"
            )


def _copies(model: nn.Module, structure: Structure) -> nn.ModuleDict:
    made = nn.ModuleDict()
    for name in structure.tail:
        module = model.get_submodule(name)
        if not all(p.is_floating_point() for p in module.parameters()):
            raise ModelError(
                f"own heads are trained copies, and the weights of {name} are not floating-point: use heads shared"
            )
        made[name.replace(".", "/")] = copy.deepcopy(module)
    if not structure.has_head:
        weight = next(p for p in model.parameters() if p.is_floating_point())
        projection = nn.Linear(structure.width, structure.width, device=weight.device, dtype=weight.dtype)
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)
        made["projection"] = projection
    return made.requires_grad_(True)


def _classifier(settings: ExitSettings, width: int) -> nn.Module:
    """Return a classifier that starts undecided: weights of 0."""
    if settings.law == "geometric":
        made: nn.Module = nn.ModuleList(nn.Linear(width, 1) for _ in settings.layers)
    else:
        made = nn.Linear(width, settings.count)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made
