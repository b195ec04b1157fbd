"""REMOTE_CODE: stock transformers refuses, or loads correctly if trusted, and never loads wrong silently."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import pickle
import sys
import textwrap

import pytest
import tiny_mixtures
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_models import tiny_bert, tiny_gpt2
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    GPT2Config,
    GPT2Model,
    PreTrainedConfig,
    Qwen2Config,
)

from hf_optim import DataConfig, ModelError, OptimConfig, optimize, restore
from hf_optim.checkpoints import remote_code
from hf_optim.checkpoints.remote_code import RemoteCode
from hf_optim.recipes.catalogue import catalogue
from hf_optim.testing.models import TINY
from hf_optim.toolkit import attention, topology
from hf_optim.toolkit.modules import remote_code_guard, replace
from hf_optim_plugins.attention.local import Local

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
CODE = Local.remote_code

IMPORTS = "import torch\nfrom transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel\n"


def converted(model=None, window=4):
    model = remote_code.convert(
        model if model is not None else tiny_gpt2(), CODE, {"window": window, "full_layers": []}
    )
    model.attach_attention()
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def checkpoint(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", logits(model)


def test_the_model_keeps_its_parameters_and_its_base_class():
    model = tiny_gpt2()
    kind, parameters = type(model), dict(model.named_parameters())
    new = converted(model)
    assert new is model
    assert type(new).__name__ == "LocalGPT2LMHeadModel"
    assert isinstance(new, kind)
    assert all(value is parameters[name] for name, value in new.named_parameters())
    assert {type(m.config).__name__ for m in new.modules() if hasattr(m, "config")} == {"LocalGPT2Config"}


def test_a_checkpoint_names_its_own_type_and_holds_its_code(checkpoint):
    directory, _ = checkpoint
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "local_gpt2"
    assert config["attention_pattern"] == {"window": 4, "full_layers": []}
    assert config["auto_map"]["AutoConfig"] == "modeling_local_gpt2.LocalGPT2Config"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_local_gpt2.LocalGPT2LMHeadModel"
    assert config["auto_map"]["AutoModel"] == "modeling_local_gpt2.LocalGPT2Model"
    tree = ast.parse((directory / "modeling_local_gpt2.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    standard = {name for name in imported if name.partition(".")[0] in sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in imported - standard} == {"torch", "transformers"}


def test_stock_transformers_refuses_at_every_entry_point(checkpoint, tmp_path, stock_python):
    directory, _ = checkpoint
    code = f"""
        for load in (AutoModelForCausalLM.from_pretrained, GPT2LMHeadModel.from_pretrained, GPT2Config.from_pretrained):
            try:
                load({str(directory)!r})
                print("loaded")
            except Exception as error:
                print("refused:", "trust_remote_code" in str(error), "needs_trust_remote_code" in str(error))
        """
    done = stock_python.copy(IMPORTS + textwrap.dedent(code))
    assert done.status == 0, done.err
    lines = [line[line.index("refused") :] for line in done.out.splitlines() if "refused" in line]
    assert lines == ["refused: True False", "refused: True True", "refused: True True"]
    assert "loaded" not in done.out


def test_with_trust_it_loads_correctly_and_can_be_saved_again(checkpoint, tmp_path, stock_python):
    directory, expected = checkpoint
    again = tmp_path / "again"
    code = f"""
        model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True).eval()
        ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
        model.save_pretrained({str(again)!r})
        """
    done = stock_python.copy(IMPORTS + textwrap.dedent(code))
    assert done.status == 0, done.err
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert (again / "modeling_local_gpt2.py").read_bytes() == (directory / "modeling_local_gpt2.py").read_bytes()
    first, second = (json.loads((d / "config.json").read_text()) for d in (directory, again))
    assert {k: v for k, v in second.items() if k != "auto_map"} == {k: v for k, v in first.items() if k != "auto_map"}
    assert "AutoModelForCausalLM" in second["auto_map"]


def test_the_process_that_made_it_needs_no_flag(checkpoint):
    directory, expected = checkpoint
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert torch.equal(logits(model), expected)
    assert type(AutoModel.from_pretrained(directory)).__name__ == "LocalGPT2Model"


def test_register_in_a_new_process_does_not_run_the_code_of_the_checkpoint(checkpoint, tmp_path, python):
    directory, expected = checkpoint
    (directory / "modeling_local_gpt2.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    code = textwrap.dedent(f"""
        import torch
        from hf_optim import remote_code
        from transformers import AutoModelForCausalLM
        print(remote_code.register("local_gpt2").__name__)
        model = AutoModelForCausalLM.from_pretrained({str(directory)!r}).eval()
        ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
    """)
    done = python.copy(code)
    assert done.status == 0, done.err
    assert done.out.strip() == "LocalGPT2Config"
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_unknown_types_are_refused():
    for model_type in ("gpt2", "local_nothing", "global_gpt2", "smoothquant_gpt2"):
        with pytest.raises(ModelError, match=model_type):
            remote_code.register(model_type)


def test_models_outside_transformers_are_refused():
    class HomeMade(GPT2Model):
        pass

    with torch.random.fork_rng():
        model = HomeMade(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    with pytest.raises(ModelError, match="HomeMade is not among the classes"):
        remote_code.convert(model, CODE, {"window": 4, "full_layers": []})
    assert type(model) is HomeMade


def test_two_heads_of_one_architecture_share_one_module():
    bert = converted(tiny_bert())
    assert type(bert).__module__ == "hf_optim_generated.modeling_local_bert"
    module = sys.modules[type(bert).__module__]
    assert remote_code.generate(CODE, remote_code.stock_class(type(bert.config))) is module
    assert issubclass(module.LocalBertForMaskedLM, nn.Module)


def test_source_that_fails_leaves_no_module_behind():
    broken = RemoteCode("broken", "raise RuntimeError('on purpose')", "Base", "number", 1)
    with pytest.raises(RuntimeError, match="on purpose"):
        remote_code.generate(broken, GPT2Config)
    assert "hf_optim_generated.modeling_broken_gpt2" not in sys.modules
    with pytest.raises(ValueError, match="broken_gpt2"):
        AutoConfig.for_model("broken_gpt2")


def test_the_generated_text_is_deterministic():
    texts = {remote_code.write_source(CODE, GPT2Config, "modeling_local_gpt2") for _ in range(2)}
    assert len(texts) == 1
    compile(texts.pop(), "modeling_local_gpt2.py", "exec")


# -- custom modules: several files as one, replaced modules, and reverting --------------------------------------------
class Doubled(nn.Module):
    """A linear layer that stores half of its weight, in place of a codebook module."""

    holds_codes = True

    def __init__(self, stock, factor):
        super().__init__()
        self.factor, self.shape = factor, tuple(stock.weight.shape)
        self.register_buffer("stored", torch.empty_like(stock.weight))
        self.bias = stock.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.factor * self.stored, self.bias)


SOURCE = "\n\n".join(
    [
        "import torch\nfrom torch import nn",
        textwrap.dedent(inspect.getsource(Doubled)),
        textwrap.dedent(
            """
            class DoublingModules(ReplacedModules):
                replaced_field = "doubling"

                def replacement(self, module, entry, said):
                    return Doubled(module, entry)
            """
        ),
    ]
)
DOUBLING = RemoteCode("doubling", remote_code.joined(replace) + SOURCE, field="doubling", model_base="DoublingModules")
UP = "bert.encoder.layer.1.intermediate.dense"


def doubled():
    model = tiny_bert()
    module = remote_code.generate(DOUBLING, type(model.config))
    made = module.Doubled(model.get_submodule(UP), 2.0)
    made.stored.copy_(model.get_submodule(UP).weight.detach() / 2)
    replace.replace_module(model, UP, made.eval())
    return remote_code.convert(model, DOUBLING, {"modules": {UP: 2.0}})


def test_joined_files_are_one_module_without_the_projects_imports(tmp_path, monkeypatch):
    (tmp_path / "joined_first.py").write_text(
        "from __future__ import annotations\n\nimport math\n\n"
        "from hf_optim.errors import (\n    DataError,\n    ModelError,\n)\n\n\n"
        "def half(x):\n    return x / 2\n"
    )
    (tmp_path / "joined_second.py").write_text(
        "from __future__ import annotations\n\nfrom torch import nn\n\n"
        "from joined_first import half\n\nHALF = half(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import joined_first
    import joined_second

    text = remote_code.joined(joined_first)
    assert text.splitlines()[0] == "from __future__ import annotations"
    assert text.count("__future__") == 1
    assert "hf_optim" not in text
    assert "import math" in text
    own = remote_code.joined(replace, joined_second)
    assert own.count("__future__") == 1
    assert own.index("class ReplacedModules") < own.index("HALF")
    compile(own, "joined.py", "exec")


def test_replaced_modules_are_built_from_the_configuration_whatever_the_head(tmp_path, stock_python):
    model = doubled()
    assert torch.equal(logits(model), logits(tiny_bert()))
    model.save_pretrained(tmp_path / "out")
    code = f"""
        from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification as Auto
        ids = torch.tensor({IDS.tolist()})
        model = Auto.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True).eval()
        assert type(model.get_submodule({UP!r})).__name__ == "Doubled"
        torch.save(model(ids).logits.detach(), {str(tmp_path / "logits.pt")!r})
        body = AutoModel.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True).eval()
        assert type(body.get_submodule({UP.removeprefix("bert.")!r})).__name__ == "Doubled"
        assert torch.equal(body(ids)[0], model.bert(ids)[0])
        assert model.config.num_hidden_layers == 2
        assert not hasattr(model.config, "layer_types") and not hasattr(model.config, "stock_layers")
        model.save_pretrained({str(tmp_path / "again")!r})
        """
    done = stock_python.copy(IMPORTS + textwrap.dedent(code))
    assert done.status == 0, done.err
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(model))
    first, second = (json.loads((tmp_path / which / "config.json").read_text()) for which in ("out", "again"))
    differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    assert differing <= {"auto_map", "dtype"}
    assert second["layer_types"] == [remote_code_guard.FOREIGN] * 2
    assert second["stock_layers"] == {"num_hidden_layers": 2}


def test_a_module_is_found_with_and_without_a_head():
    model = tiny_bert()
    assert replace.resolve_module_name(model, UP) == UP
    assert replace.resolve_module_name(model, UP.removeprefix("bert.")) == UP
    assert replace.resolve_module_name(model.bert, UP) == UP.removeprefix("bert.")
    assert replace.resolve_module_name(model, "bert.encoder.layer.9.output") is None


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("step", ["strided", "gobo"])
def test_a_mixture_that_was_loaded_keeps_its_experts(architecture, step, tmp_path):
    """Its stock class reads one matrix of each expert, by conversions for its ``model_type`` that no other type has."""
    base = tiny_mixtures.build(architecture) if architecture not in TINY else TINY[architecture]()
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", optim_config=step).eval()
    restore(model)
    attention.attach_again(model)
    model.save_pretrained(tmp_path / "out")
    again, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval()), logits(model), atol=1e-6, rtol=0)


@pytest.mark.many
@pytest.mark.parametrize(
    "name", [name for name in catalogue().names() if hasattr(catalogue().get(name), "remote_code")]
)
def test_a_subclass_of_a_generated_class_has_its_forward(name):
    """Offloaded models and those with a capacity have a subclass of their class, whose forward is not wrapped again."""
    module = remote_code.generate(catalogue().get(name).remote_code, GPT2Config)
    own = getattr(module, f"{catalogue().get(name).remote_code.prefix}GPT2LMHeadModel")
    subclass = type(own.__name__, (own,), {})
    assert subclass.forward is own.forward
    assert subclass.generate is own.generate


def test_revert_restores_the_stock_classes():
    model = doubled()
    parameters = list(model.state_dict())
    assert type(model).__name__ == "DoublingBertForSequenceClassification"
    assert remote_code.revert(model) is model
    stock = tiny_bert()
    assert type(model) is type(stock)
    assert type(model.config) is type(stock.config)
    assert model.config.to_dict().keys() == stock.config.to_dict().keys()
    assert {type(m.config) for m in model.modules() if hasattr(m, "config")} == {type(stock.config)}
    assert list(model.state_dict()) == parameters  # the modules are not changed
    assert remote_code.revert(stock) is stock
    assert type(remote_code.revert(converted())) is type(tiny_gpt2())


# -- stock classes loaded by name -------------------------------------------------------------------------------------
GOBO, PEG, MIXED = ({"technique": "gobo"}, {"technique": "peg"}, {"technique": "mixed_precision", "sites": "all"})
# qwen2 configurations have layer types of their own.
CODED = [(name, GOBO) for name in ("llama", "bert", "gpt2", "vit", "t5", "qwen2")]
CODED += [("bert", PEG), ("t5", PEG), ("vit", MIXED)]


@pytest.mark.many
@pytest.mark.parametrize(
    ("architecture", "step"), CODED, ids=lambda each: each if isinstance(each, str) else each["technique"]
)
def test_every_stock_class_refuses_and_trusted_code_loads_correctly(architecture, step, stock, tmp_path):
    make = TINY[architecture]
    name, inputs = type(make()).__name__, topology.dummy_inputs(make())
    model = optimize(make(), [step], calibration=[inputs])
    model.save_pretrained(tmp_path / "out")
    for asked in (name, type(make().base_model).__name__):
        with pytest.raises(OSError, match=r"(?s)layer_types.*needs_trust_remote_code"):
            stock.logits(tmp_path / "out", asked, inputs)
    # With trust, and in this process, which has registered the type: the same model, also when it is saved again.
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    auto = next(auto for auto, place in auto_map.items() if place.endswith(f".{type(model).__name__}"))
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.equal(stock.logits(tmp_path / "out", auto, inputs, trust_remote_code=True)[1], expected)
    own = getattr(transformers, auto).from_pretrained(tmp_path / "out").eval()
    loaded, before = own.config.to_dict(), model.config.to_dict()
    assert {key for key in loaded.keys() | before.keys() if loaded.get(key) != before.get(key)} <= {"_name_or_path"}
    own.save_pretrained(tmp_path / "again")
    assert torch.equal(stock.logits(tmp_path / "again", auto, inputs, trust_remote_code=True)[1], expected)
    with pytest.raises(OSError, match="layer_types"):
        stock.logits(tmp_path / "again", name, inputs)


def test_a_configuration_without_a_number_of_layers_is_refused_too(tmp_path):
    config = remote_code.generate(DOUBLING, CLIPConfig).DoublingCLIPConfig(doubling={"modules": {}})
    config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match="needs_trust_remote_code"):
        CLIPConfig.from_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert not hasattr(again, "num_hidden_layers")


def test_layer_types_of_the_architecture_are_restored(tmp_path):
    types = ["full_attention", "sliding_attention"]
    made = remote_code.generate(DOUBLING, Qwen2Config).DoublingQwen2Config(
        num_hidden_layers=2, layer_types=types, use_sliding_window=True
    )
    made.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match="needs_trust_remote_code"):
        Qwen2Config.from_pretrained(tmp_path)
    assert type(made).from_pretrained(tmp_path).layer_types == types
    assert (
        PreTrainedConfig.from_pretrained(tmp_path).layer_types == [remote_code_guard.FOREIGN] * 2
    )  # as AutoTokenizer reads it


@pytest.mark.real_model
def test_compress_evaluates_a_result_with_remote_code(shared_models, shared_data, tmp_path):
    """The result is loaded with its own code and the head it was saved with, and its card has the metrics."""
    from hf_optim.checkpoints.source import ModelSource
    from hf_optim.cli.jobs.compress import Job, compress

    evaluation = DataConfig(str(shared_data / "tinystories" / "eval.jsonl"), samples=2)
    recipe = OptimConfig.parse([{"technique": "gobo", "bits": 4}])
    run = compress(
        Job(ModelSource(str(shared_models / "stories260k")), recipe, tmp_path / "out", evaluation, device="cpu")
    )
    before, after = (run.record.measured[side] for side in ("before", "after"))
    assert before["perplexity"] < after["perplexity"] < 1.5 * before["perplexity"]
    assert run.record.reload == "REMOTE_CODE"


def test_generated_classes_are_copied_and_pickled_in_this_process():
    model = converted(tiny_bert())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert type(again.config) is type(model.config)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        assert next(again.parameters()) is not next(model.parameters())
