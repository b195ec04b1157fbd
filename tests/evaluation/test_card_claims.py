"""Cards say nothing of a checkpoint that is not true of it, whatever the recipe is composed of.

Every pair of techniques that composes is walked: the sentences about how weights are stored, loaded and computed are
held against the traits, the reload level and the files of the result.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from functools import cache
from types import SimpleNamespace

import pytest
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from tiny_tokenizer import tiny_tokenizer
from transformers import ViTImageProcessor, WhisperFeatureExtractor

import hf_optim
from hf_optim import Contract, OptimConfig, RecipeError, Reload, Technique, hookimpl, technique, traits
from hf_optim.evaluation.cards.card import Card
from hf_optim.evaluation.cards.result import LIMITS, Result
from hf_optim.recipes.catalogue import catalogue
from hf_optim.runs.record import Record
from hf_optim.runs.run import run_of
from hf_optim.testing import tiny_runs

DECODES = "Stock transformers decodes the weights"


def contradictions(record: Record, text: str, config: dict | None = None) -> list[str]:
    """What a card says that its record and its config.json do not bear out, by rule."""
    has = {str(name): str(name) in record.traits for name in traits.BUILT_IN}
    level = Reload[record.reload]
    stored = (config or {}).get("quantization_config", {}).get("quant_method")
    compressed = stored == "compressed-tensors" if config is not None else has["quantized"] and "STOCK" in level.name
    remote = level is Reload.REMOTE_CODE
    capped = "routing" in (config or {}).get("hf_optim", {})
    # Fewer heads or more positions are another architecture of the same class.
    same_class = (config or {}).get("architectures") == [record.base_model.get("class")]
    spread = any(step.get("technique") == "parallelism" for step in record.recipe.get("steps", []))
    body = re.sub(r"```.*?```", "", text.split("## Results")[1], flags=re.DOTALL)
    snippets = "".join(re.findall(r"```python.*?```", text, re.DOTALL))
    expected = {
        "(compressed-tensors)": compressed,
        DECODES: compressed,
        "- compressed-tensors\n": compressed,  # the tag
        f'optim_config="auto"{", trust_remote_code=True" * remote})': compressed or capped or spread,
        "computes the experts without their capacity": capped,
        "trust_remote_code=True": level is Reload.REMOTE_CODE,
        "- custom_code\n": level is Reload.REMOTE_CODE,
        "An ordinary checkpoint of the same class": level is Reload.STOCK_DENSE,
        "Another class that ships in transformers": level is Reload.STOCK_ARCH and not same_class,
        "Own model code": level is Reload.REMOTE_CODE,
        "The N:M zeros are stored; they save time": has["sparse-nm"] and not has["quantized"],
        "N:M zeros in experts save no time": has["sparse-nm"] and has["moe"],
        "The N:M zeros are stored as codes": has["sparse-nm"] and has["quantized"],
        "saves neither bytes nor time": has["sparse"] and not has["sparse-nm"] and not has["quantized"],
        "Zeros are stored as codes": has["sparse"] and not has["sparse-nm"] and has["quantized"],
        "only those that a token is routed to": has["moe"],
        "base_model_relation: quantized": has["quantized"] and "base_model:" in text,
    }
    wrong = [f"{'lacks' if due else 'says'} {phrase!r}" for phrase, due in expected.items() if (phrase in text) != due]
    # Of steps, which do not know what comes after them.
    only_if = {
        "ordinary model": level is Reload.STOCK_DENSE and not has["quantized"],
        "dense checkpoint": level is Reload.STOCK_DENSE and not has["quantized"],
        # Without a config the format of a class of its own is not known.
        "decodes them": compressed or (config is None and remote and has["quantized"]),
        "codes are decoded when": level is Reload.REMOTE_CODE,
        "of the targeted weights are zero": has["sparse"],
        "smallest weights, ranked": has["sparse"],
        "No step of this recipe made such a mask": not has["sparse-nm"],
        "no speed-up": False,
    }
    wrong += [f"says {phrase!r}" for phrase, allowed in only_if.items() if phrase in body and not allowed]
    if config is not None and "AutoTokenizer" in snippets:
        wrong.append("loads a tokenizer that the checkpoint has not")
    if config is not None and "AutoModelForCausalLM.from_pretrained(checkpoint" not in snippets:
        wrong.append("loads the model without its head")
    if config is not None and "pipeline_tag: text-generation" not in text:
        wrong.append("has another task")
    return wrong


def _composes(*steps) -> OptimConfig | None:
    recipe = OptimConfig(steps=steps)
    try:
        recipe.check()
    except RecipeError:
        return None
    return recipe


STEPS = [cls.for_testing() for cls in catalogue().all()]
PAIRS = {
    (a.spec.name, b.spec.name): recipe
    for a, b in itertools.product(STEPS, repeat=2)
    if (recipe := _composes(a, b)) is not None
}


def takes(step, model):
    """Return True if a step does not refuse a model."""
    try:
        step.check_model(model, step.name)
    except hf_optim.ModelError:
        return False
    return True


@cache
def entry_of(name):
    """What a technique reports and covers when it runs alone (with what it needs beside it) on a tiny model.

    None for one that trains: these take part in the real runs of the slow test.
    """
    cls = catalogue().get(name)
    recipe = tiny_runs.recipe_for(cls)
    first = recipe.steps[0]  # what the others need of a model, it may make
    if any(stage.trains for stage in recipe.stages):
        return None
    model = next(
        model
        for build, sizes in (("llama", 1), ("mixtral", 1), ("t5", 2), ("vit", 2), ("bert", 2), ("llama", 2))
        if takes(first, model := TINY[build](**{"num_layers" if build == "t5" else "num_hidden_layers": sizes}))
    )
    made = hf_optim.optimize(model, recipe, calibration=[tiny_runs.inputs_for(model, seed=s) for s in range(2)])
    run = run_of(made)
    step = next(step for step in run.recipe.steps if isinstance(step, cls))
    return copy.deepcopy(run.reported(step)), run.covered(step)


@pytest.mark.many
@pytest.mark.parametrize("first", sorted({pair[0] for pair in PAIRS}))
def test_every_pair_that_composes_has_a_card_without_contradictions(first, tmp_path):
    """The card of each pair from what its steps report alone, with the traits and the reload level of the pair."""
    wrong = {}
    for (a, b), recipe in PAIRS.items():
        if a != first:
            continue
        record = Record(recipe=recipe.to_dict(), reload=recipe.reload.name, finished=True)
        record.traits = sorted(map(str, recipe.check()))
        card = Card(record)
        for step in recipe.steps:
            if step.implements("export") and (found := entry_of(step.name)) is not None:
                stub = SimpleNamespace(
                    record=record,
                    reported=lambda step, found=found: found[0],
                    covered=lambda step, found=found: found[1],
                )
                step.export(run=stub, directory=tmp_path, card=card)
        if found := contradictions(record, card.render()):
            wrong[a, b] = found
    assert not wrong


REAL = [
    ["magnitude", "gptq"],
    ["nm", "rtn"],
    ["structured", "rtn"],
    ["structured", "gobo"],
    ["upcycle", "rtn"],
    ["local", "zeroquant"],
    ["channel_permutation", "magnitude"],
    ["channel_permutation", "nm"],
    ["magnitude", "upcycle"],
    ["nm", "llm_int8"],
]


@pytest.mark.many
@pytest.mark.parametrize("names", REAL, ids=", ".join)
def test_the_card_of_a_saved_checkpoint_is_true_of_its_files(names, tmp_path):
    check_saved(PAIRS[tuple(names)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", sorted({pair[0] for pair in PAIRS}))
def test_every_pair_that_composes_is_saved_with_a_true_card(first, tmp_path):
    for (a, b), recipe in PAIRS.items():
        if a == first:
            check_saved(recipe, tmp_path / b)


def check_saved(recipe, folder):
    model = TINY["llama"]()
    try:
        model = hf_optim.optimize(model, recipe, calibration=[tiny_runs.inputs_for(model, seed=s) for s in range(2)])
        while run_of(model).stage is not None:
            entered = run_of(model).stage_entered
            model = tiny_runs.train(model, folder / "training") if entered else hf_optim.advance(model)
    except (hf_optim.ModelError, RecipeError):
        return  # refused for this model
    model.save_pretrained(folder / "out")
    record = Record.read(folder / "out")
    config = json.loads((folder / "out" / "config.json").read_text())
    assert contradictions(record, (folder / "out" / "README.md").read_text(), config) == []


def test_the_rules_find_what_they_are_for():
    """The cards of the past, and claims without their conditions, are contradictions."""
    record = Record(
        recipe={"steps": [{"technique": "nm"}, {"technique": "gptq"}]},
        traits=["quantized", "sparse", "sparse-nm"],
        reload="STOCK_FORMAT",
    )
    card = Card(record)
    assert contradictions(record, card.render()) == []
    card.paragraph("2:4 sparsity", "The zeros are stored in an ordinary dense checkpoint; they give no speed-up.")
    assert contradictions(record, card.render()) == ["says 'dense checkpoint'", "says 'no speed-up'"]
    dense = Record(traits=["float-weights", "sparse"], reload="STOCK_DENSE")
    text = Card(dense).render()
    for claim in LIMITS:
        assert claim.text in text or contradictions(dense, f"{text}\n- {claim.text}"), claim.text


def test_a_step_says_what_is_true_of_the_result():
    dense, packed = (
        Card(Record(traits=[trait], reload=level))
        for trait, level in (("sparse", "STOCK_DENSE"), ("quantized", "STOCK_FORMAT"))
    )
    for card, has, lacks, reload in (
        (dense, [traits.SPARSE], [traits.QUANTIZED], [Reload.STOCK_DENSE]),
        (packed, [traits.QUANTIZED], [traits.SPARSE], []),
    ):
        other = packed if card is dense else dense
        assert card.when("It is so.", has=has, lacks=lacks, reload=reload) == " It is so."
        assert other.when("It is so.", has=has, lacks=lacks, reload=reload) == ""
    assert dense.when("It is so.") == " It is so."
    assert dense.when("It is so.", reload=[Reload.REMOTE_CODE]) == ""


@technique("claims_test_code", family="toy", contract=Contract(), reload=Reload.STOCK_DENSE)
class Claiming(Technique):
    """Says that the checkpoint is dense, if it is."""

    @hookimpl
    def export(self, run, directory, card):
        card.paragraph("Toy", "Done." + card.when("It is dense.", lacks=[traits.QUANTIZED]))


@pytest.mark.parametrize(("later", "said"), [([], True), ([{"technique": "rtn", "bits": 8}], False)])
def test_the_card_of_a_step_depends_on_the_steps_after_it(later, said, tmp_path):
    later = [catalogue().get(step["technique"])(bits=step["bits"]) for step in later]
    hf_optim.optimize(tiny_llama(), [Claiming(), *later]).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Done." in text
    assert ("It is dense." in text) == said


# -- tokenizers and processors -----------------------------------------------------------------------------------------


def loading(folder):
    text = Card(Record(), folder).render()
    return text.split("## How to load")[1].split("## Recipe")[0]


def test_a_model_without_a_tokenizer_loads_none(tmp_path):
    hf_optim.optimize(tiny_llama(), "magnitude").save_pretrained(tmp_path)
    shown = loading(tmp_path)
    assert "AutoModelForCausalLM.from_pretrained(checkpoint)" in shown
    assert "okenizer" not in shown
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "tokenizer = AutoTokenizer.from_pretrained(checkpoint)" in loading(tmp_path)
    compile(re.search(r"```python\n(.*?)```", loading(tmp_path), re.DOTALL)[1], "snippet", "exec")


@pytest.mark.filterwarnings("ignore:these layers run on dense kernels")
@pytest.mark.parametrize(("activations", "said"), [("int4", True), ("int8", False)])
def test_inputs_that_no_kernel_multiplies_are_told(activations, said, tmp_path):
    recipe = [{"technique": "rtn", "bits": 4, "group_size": None, "activations": activations}]
    hf_optim.optimize(tiny_llama(), recipe).save_pretrained(tmp_path)
    text = loading(tmp_path)
    assert ("No kernel multiplies inputs of 4 bits" in text) == said
    assert ("keep the weights compressed" in text) != said
    packed = hf_optim.report(type(tiny_llama()).from_pretrained(tmp_path, optim_config="auto"))
    assert said == all("inputs quantized to 4 bits" in row.reason for row in packed if row.name != "lm_head")


def test_code_of_a_checkpoint_is_trusted_in_every_call_of_the_snippet(tmp_path, stock_python):
    """A tokenizer reads the configuration, too, and asks whether its code may run."""
    model = hf_optim.optimize(tiny_gpt2(), {"technique": "blockwise", "block": 8})
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    shown = Card(Record.read(tmp_path), tmp_path).render().split("## How to load")[1].split("## Recipe")[0]
    assert "tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)" in shown
    source = re.search(r"```python\n(.*?)```", shown, re.DOTALL)[1].replace('"..."', repr(str(tmp_path)))
    done = stock_python.copy(source + "\nresult = [type(model).__name__, len(tokenizer) > 0]")
    assert done.status == 0, done.err
    assert done.result == ["BlockwiseGPT2LMHeadModel", True]
    assert "`hf_optim.remote_code.register(...)`, called with the `model_type`" in shown


def test_processors_are_loaded_by_their_auto_class(tmp_path):
    homes = {name: tmp_path / name for name in ("image", "sound", "both", "none", "audio and text")}
    for home in homes.values():
        tiny_vit().save_pretrained(home)
    ViTImageProcessor().save_pretrained(homes["image"])
    WhisperFeatureExtractor().save_pretrained(homes["sound"])
    WhisperFeatureExtractor().save_pretrained(homes["audio and text"])
    ViTImageProcessor().save_pretrained(homes["both"])
    tiny_tokenizer().save_pretrained(homes["both"])
    tiny_tokenizer().save_pretrained(homes["audio and text"])
    assert "processor = AutoImageProcessor.from_pretrained(checkpoint)" in loading(homes["image"])
    assert "processor = AutoFeatureExtractor.from_pretrained(checkpoint)" in loading(homes["sound"])
    for name in ("both", "audio and text"):
        assert "processor = AutoProcessor.from_pretrained(checkpoint)" in loading(homes[name])
    assert "rocessor" not in loading(homes["none"])


def test_a_folder_with_a_record_alone_shows_what_models_of_the_task_have(tmp_path):
    for name, expected in (("ViTForImageClassification", "AutoImageProcessor"), ("LlamaForCausalLM", "AutoTokenizer")):
        record = Record(base_model={"class": name})
        assert Result(record, tmp_path).processor() == expected
        assert expected in Card(record, tmp_path).render()


def test_a_card_from_python_has_the_bytes_of_the_original(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "original")
    model = type(tiny_bert()).from_pretrained(tmp_path / "original", optim_config={"steps": [{"technique": "rtn"}]})
    model.save_pretrained(tmp_path / "out")
    before = (tmp_path / "original" / "model.safetensors").stat().st_size
    after = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert Record.read(tmp_path / "out").measured == {
        "before": {"bytes_on_disk": before},
        "after": {"bytes_on_disk": after},
    }
    row = re.search(r"\| weights on disk \(bytes\) \| (.*?) \|\n", (tmp_path / "out" / "README.md").read_text())[1]
    assert f"({before:,})" in row
    assert f"({after:,})" in row
