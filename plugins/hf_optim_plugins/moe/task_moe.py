r"""Task-level mixtures of experts: an encoder-decoder whose experts are chosen by the task of a sequence.

    g = softmax(v_task),    y = sum over the k largest g_e of  g_e FFN_e(x)

``v_task`` is a row of E learned numbers for each task (a target language, a pair of languages) in each layer. So all
tokens of a sequence use the same k experts of a layer with the same gates, and serving one task needs only these: with
``extract`` the sub-model of one task becomes an ordinary dense T5,

    wi = [W1_e1; ...; W1_ek],      wo = [g_e1 W2_e1, ..., g_ek W2_ek],      d_ff = k F

which is exact for every activation that works element by element, with a gate too.

Kudugunta et al., "Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference", arXiv 2110.03742.

``routing: token`` is the counterpart: a router for each token, g = softmax(W x), with a balance loss of E sum_e f_e P_e
(f the shares of choices, P the mean probabilities). The gates of the chosen experts are scaled to 1 (``normalize``),
so that experts which start as copies compute what the dense model does; with k = 1 they are then 1, and a task keeps
the experts it started with. The tasks start with different experts, as far as there are enough. In the paper routing
by task is learned as that of tokens is, with a balance loss; here with so few tasks it has none.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import (
    Card,
    Contract,
    ModelError,
    Paper,
    RecipeError,
    Reload,
    Run,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode, convert, converted_skeleton, generate, joined, stock_class
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import coded_experts, grouped_experts, mixtures_in_dense, own_loss, replace, transplant

from . import _task_moe_modules

FIELD = _task_moe_modules.TaskModel.replaced_field
MAKES = Contract(needs={traits.FLOAT_WEIGHTS}, forbids={traits.QUANTIZED}, adds={traits.MOE}, owns={"experts"})
# Whether a model has experts of a task is known when it is loaded (``check_model``).
EXTRACTS = Contract(needs={traits.FLOAT_WEIGHTS}, forbids={traits.QUANTIZED}, drops={traits.MOE}, owns={"experts"})


@technique(
    "task_moe",
    family="moe",
    paper=Paper("2110.03742", "Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference", 2021),
    contract=MAKES,
    reload=Reload.REMOTE_CODE,
)
class TaskMoE(Technique):
    """Give a T5 experts that are chosen by the task of a sequence, or take the dense sub-model of one task out of it.

    Attributes:
        tasks: their names, such as target languages. ``task_ids`` of a batch are positions in this list.
        extract: the name of a task: the model must be the result of this technique, and becomes the dense sub-model
            of the task. Other fields are then not used.
        routing: ``task``, or ``token`` for the counterpart that routes every token by itself.
        experts: E, experts per mixture.
        top_k: k, experts per sequence or token.
        where: mixtures in the ``decoder``, the ``encoder``, or ``both``.
        every: 1 makes every layer a mixture, 2 every second one (the second, the fourth ...).
        normalize: scale the gates of the chosen experts to 1.
        balance_loss: weight of the balance loss, with routing by token.
        start: experts start as ``copies`` of the dense layer, or at ``random``.
        expert_noise: standard deviation of noise on copies, relative to that of each weight matrix.
        router_std: standard deviation of the router's weights or of the numbers of tasks at the start.
        seed: of these, of random experts and of noise on copies.
    """

    tasks: tuple[str, ...] = ()
    extract: str | None = None
    routing: Literal["task", "token"] = "task"
    experts: int = option(4, low=1, high=2**31 - 1)
    top_k: int = option(2, low=1)
    where: Literal["decoder", "encoder", "both"] = "both"
    every: int = option(1, low=1)
    normalize: bool = True
    balance_loss: float = option(0.01, low=0.0)
    start: Literal["copies", "random"] = "copies"
    expert_noise: float = option(0.0, low=0.0)
    router_std: float = option(0.02, low=0.0)
    seed: int = option(0, low=0)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="task_moe",
        source=joined(coded_experts, grouped_experts, own_loss, replace, mixtures_in_dense, _task_moe_modules),
        field=FIELD,
        model_base=_task_moe_modules.TaskModel.__name__,
    )

    def validate(self) -> None:
        if self.extract is not None:
            return
        if self.top_k > self.experts:
            raise RecipeError(f"task_moe: top_k ({self.top_k}) cannot exceed experts ({self.experts})")
        if self.routing == "task" and not self.tasks:
            raise RecipeError("task_moe: routing by task needs the names of the tasks, such as tasks: [de, fr]")
        if len(set(self.tasks)) < len(self.tasks) or not all(self.tasks):
            raise RecipeError("task_moe: the names of the tasks must differ, and none may be empty")
        if self.start == "random" and self.expert_noise:
            raise RecipeError("task_moe: expert_noise is for experts that start as copies")

    @classmethod
    def for_testing(cls) -> Technique:
        # The suite's batches have no tasks.
        return cls.from_dict({"routing": "token", "expert_noise": 0.1})

    def contract(self) -> Contract:
        return MAKES if self.extract is None else EXTRACTS

    def reload(self) -> Reload:
        return Reload.REMOTE_CODE if self.extract is None else Reload.STOCK_DENSE

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        if self.extract is None:
            self._chosen(model, label)
        else:
            self._task(model, label)

    def model_after(self, model: PreTrainedModel, label: str) -> PreTrainedModel | None:
        if self.extract is not None:
            return None
        chosen = self._chosen(model, label)
        modules = {name: self._entry(layer) for name, layer in chosen.items()}
        return converted_skeleton(model, self.remote_code, {**self._settings(chosen), "modules": modules})

    def _entry(self, layer: nn.Module) -> dict[str, int]:
        hidden, inner = layer.get_parameter("wo.weight").shape
        return {"hidden": hidden, "inner": inner}

    def _settings(self, chosen: dict[str, nn.Module]) -> dict[str, Any]:
        """Return the settings of the mixtures, as the configuration of the checkpoint has them."""
        return {
            "tasks": list(self.tasks),
            "gated": hasattr(next(iter(chosen.values())), "wi_0"),
            **{key: getattr(self, key) for key in ("routing", "experts", "top_k", "normalize", "balance_loss")},
        }

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel | None:
        if self.extract is None:
            self._make(run)
            return None
        return self._extract(run)

    # -- making -------------------------------------------------------------------------------------------------------
    def _chosen(self, model: PreTrainedModel, label: str) -> dict[str, nn.Module]:
        """Return the feed-forward parts to replace, by name. Raises ``ModelError`` if there are none."""
        if model.config.model_type == "nllb-moe":
            raise ModelError(
                f"{label}: NLLB-MoE cannot be the base: transformers (5.17 to 5.24) runs only its experts 0 and 1, "
                "whatever the router chooses, so its weights are not what the model computes; start from a T5"
            )
        if topology.has_experts(model):
            raise ModelError(f"{label} does not support a model that routes tokens to experts: {type(model).__name__}")
        found = feed_forwards(model)
        if not found:
            raise ModelError(
                f"{label}: {type(model).__name__} has no feed-forward parts of a T5 (T5, mT5, UMT5), which are what "
                "the sub-model of a task can be written as"
            )
        sides = ("encoder", "decoder") if self.where == "both" else (self.where,)
        chosen: dict[str, nn.Module] = {}
        for side in sides:
            layers = [name for name in found if name.startswith(f"{side}.") or f".{side}." in name]
            chosen |= {name: found[name] for name in layers[self.every - 1 :: self.every]}
        if not chosen:
            raise ModelError(f"{label}: where={self.where} and every={self.every} select no layer")
        return chosen

    def _make(self, run: Run) -> None:
        model = run.model
        chosen = self._chosen(model, run.label(self))
        before = model.num_parameters()
        settings = self._settings(chosen)
        made = generate(self.remote_code, stock_class(type(model.config)))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed)
        modules = {}
        for name, layer in chosen.items():
            modules[name] = entry = self._entry(layer)
            with torch.device("meta"):
                mixture = made.TaskMixture(model.config, settings, entry["hidden"], entry["inner"])
            self._fill(mixture, layer, generator)
            replace.replace_module(model, name, mixture.train(layer.training))
        convert(model, self.remote_code, {**settings, "modules": modules})
        run.cover(self, [f"{name}.experts" for name in chosen])
        run.report(
            self,
            experts=self.experts,
            top_k=self.top_k,
            layers=len(chosen),
            parameters_before=before,
            parameters_after=model.num_parameters(),
        )

    def _fill(self, mixture: Any, layer: nn.Module, generator: torch.Generator) -> None:
        """Replace the empty parameters of a mixture by those it starts with, in the dtype and place of ``layer``."""
        up, down = dense_matrices(layer)
        for name, dense in ((mixture.experts.up_name, up), ("down_proj", down)):
            stacked = dense.detach().unsqueeze(0).repeat(self.experts, 1, 1)
            scale = dense.detach().float().std() * (1.0 if self.start == "random" else self.expert_noise)
            if self.start == "random":
                stacked.zero_()
            if float(scale) or self.start == "random":
                drawn = torch.randn(stacked.shape, generator=generator).to(stacked)
                stacked.add_(drawn * scale.to(stacked))
            mixture.experts.register_parameter(name, nn.Parameter(stacked, requires_grad=dense.requires_grad))
        width = down.shape[0] if self.routing == "token" else len(self.tasks)
        drawn = torch.randn(self.experts, width, generator=generator) * self.router_std
        if self.routing == "token":
            mixture.router.register_parameter("weight", nn.Parameter(drawn.to(down.detach())))
        else:
            mixture.task_logits = nn.Parameter(spread(drawn.t(), self.top_k).to(down.detach()))

    # -- extraction ---------------------------------------------------------------------------------------------------
    def _task(self, model: PreTrainedModel, label: str) -> int:
        """Return the number of the task to extract. Raises ``ModelError`` if the model does not have it."""
        settings = getattr(model.config, FIELD, None)
        if not isinstance(settings, dict) or not hasattr(model, "task_mixtures"):
            raise ModelError(f"{label}: {type(model).__name__} was not made by task_moe, so it has no task to extract")
        if settings.get("routing") != "task":
            raise ModelError(f"{label}: the model routes by token, so all of its experts serve every task")
        tasks = [str(task) for task in settings.get("tasks") or ()]
        if self.extract not in tasks:
            known = ", ".join(task.encode("unicode_escape").decode()[:40] for task in tasks[:20])
            raise ModelError(f"{label}: no task {self.extract!r}; the model has {known}")
        return tasks.index(self.extract)

    def _extract(self, run: Run) -> PreTrainedModel:
        model = run.model
        number = self._task(model, run.label(self))
        made = sub_model(model, number)
        run.report(
            self,
            task=number,
            parameters_before=model.num_parameters(),
            parameters_after=made.num_parameters(),
            width=made.config.d_ff,
        )
        run.cover(self, list(feed_forwards(made)))
        run.record.reload = Reload.STOCK_DENSE.name
        return made

    # -- record and card ----------------------------------------------------------------------------------------------
    def recompute(self, case: Any) -> dict[str, Any]:
        old, new = (sum(p.numel() for p in model.parameters()) for model in (case.before, case.after))
        counts = {"parameters_before": old, "parameters_after": new}
        if self.extract is not None:
            tasks = getattr(case.before.config, FIELD)["tasks"]
            return {**counts, "task": tasks.index(self.extract), "width": case.config["d_ff"]}
        settings = case.config[FIELD]
        layers = sum(name.endswith(".experts.down_proj") for name in case.tensors)
        return {**counts, "experts": settings["experts"], "top_k": settings["top_k"], "layers": layers}

    @hookimpl
    def export(self, run: Run, directory: Any, card: Card) -> None:
        reported = run.reported(self)
        sizes = f"{reported['parameters_before']:,} parameters became {reported['parameters_after']:,}"
        if self.extract is not None:
            card.paragraph(
                "Sub-model of a task",
                f"The experts of task {reported['task']} ({self.extract}) were taken out of a task-level mixture and "
                f"written as dense feed-forward layers of width {reported['width']}; {sizes}. It computes what the "
                "mixture computed for this task.",
            )
            return
        by = f"by task ({', '.join(self.tasks)}): pass `task_ids`" if self.routing == "task" else "by token"
        card.paragraph(
            "Mixture of experts",
            f"The feed-forward parts of {reported['layers']} layers are mixtures of {reported['experts']} experts, of "
            f"which {reported['top_k']} are used, chosen {by}; {sizes}.",
        )


def feed_forwards(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the feed-forward parts of a T5 by name, in their order: ``wi`` or ``wi_0`` and ``wi_1``, and ``wo``."""
    found = {}
    for name, module in model.named_modules():
        linears = {key: part for key, part in module.named_children() if type(part) is nn.Linear}
        if set(linears) in ({"wi", "wo"}, {"wi_0", "wi_1", "wo"}) and all(x.bias is None for x in linears.values()):
            found[name] = module
    return found


def dense_matrices(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the matrices of a feed-forward part: into it (with a gate both, ``[2F, d]``) and out of it ``[d, F]``."""
    down = layer.get_parameter("wo.weight")
    if hasattr(layer, "wi"):
        return layer.get_parameter("wi.weight"), down
    first = layer.get_parameter("wi_0.weight")
    both = torch.cat([first.detach(), layer.get_parameter("wi_1.weight").detach()])
    return nn.Parameter(both, requires_grad=first.requires_grad), down


def spread(logits: Tensor, top_k: int) -> Tensor:
    """Return logits ``[tasks, E]`` reordered within each row, so that tasks start with different experts.

    The largest k of task t go to the experts t k, t k + 1 ..., around and around.
    """
    tasks, experts = logits.shape
    ordered = logits.sort(-1, descending=True).values
    places = (torch.arange(experts) + top_k * torch.arange(tasks).unsqueeze(1)) % experts
    return torch.empty_like(ordered).scatter_(1, places, ordered)


@torch.no_grad()
def sub_model(model: PreTrainedModel, task: int) -> PreTrainedModel:
    """Return the dense model of one task, of the class of transformers that ``model`` was made from.

    Experts become one feed-forward layer, with the gates in its last matrix. Layers that were no mixtures get inner
    channels of zeros, if the sub-model is wider. All other tensors are shared.
    """
    classes = [cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")]
    configs = [cls for cls in type(model.config).__mro__ if cls.__module__.startswith("transformers.models.")]
    settings = getattr(model.config, FIELD)
    width = next(iter(settings["modules"].values()))["inner"] * settings["top_k"]
    config: PretrainedConfig = transplant.translate_config(model.config, configs[0], d_ff=width)
    for name in (FIELD, "auto_map"):
        vars(config).pop(name, None)
    config._experts_implementation_internal = None  # the dense class has no experts
    with torch.device("meta"):
        made: PreTrainedModel = classes[0](config)
    given = dict(model.named_parameters(remove_duplicate=False))
    given |= dense_weights(model, task, width)
    for name in dict(made.named_parameters(remove_duplicate=False)):
        transplant.set_tensor(made, name, given[name])
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name in dict(made.named_buffers(remove_duplicate=False)):
        transplant.set_tensor(made, name, buffers[name])
    if model.can_generate():
        made.generation_config = model.generation_config
    return made.train(model.training)


def dense_weights(model: PreTrainedModel, task: int, width: int) -> dict[str, nn.Parameter]:
    """Return the matrices of all feed-forward parts for one task, by name, with ``width`` inner channels."""
    found: dict[str, Tensor] = {}
    for name, mixture in model.named_modules():
        if not hasattr(mixture, "task_logits"):
            continue
        own: Any = mixture
        gates, chosen, _ = own.gates_of(own.task_logits[task])
        up = own.experts.get_parameter(own.experts.up_name)[chosen]
        down = own.experts.down_proj[chosen] * gates.to(up).view(-1, 1, 1)
        parts = {"wi": up} if up.shape[1] == down.shape[2] else dict(zip(("wi_0", "wi_1"), up.chunk(2, 1), strict=True))
        found |= {f"{name}.{key}.weight": part.reshape(-1, part.shape[-1]) for key, part in parts.items()}
        found[f"{name}.wo.weight"] = torch.cat(list(down), 1)
    for name, layer in feed_forwards(model).items():
        for key, weight in layer.named_parameters():
            rows = key.startswith("wi")
            missing = width - weight.shape[0 if rows else 1]
            padding = (0, 0, 0, missing) if rows else (0, missing)
            found[f"{name}.{key}"] = weight if not missing else nn.functional.pad(weight, padding)
    return {name: nn.Parameter(value.detach().clone()) for name, value in found.items()}


@hookimpl
def register_techniques(register) -> None:
    register(TaskMoE)
