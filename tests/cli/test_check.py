"""``check`` refuses what ``compress`` refuses, with the same words, and says what a run costs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_vit
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    GptOssConfig,
    GptOssForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_optim.cli import main
from hf_optim.cli.check import check
from hf_optim.errors import ModelError, OptimError
from hf_optim.recipes.config import OptimConfig
from hf_optim.testing.models import DECODER

VOCABULARY = 259
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt_oss():
    config = {**DECODER, "vocab_size": VOCABULARY, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**config, layer_types=["full_attention"] * 2, sliding_window=16))


def clip():
    text = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def whisper():
    sides = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))
    }
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **sides,
    )
    return WhisperForConditionalGeneration(config)


MODELS = {
    "llama": lambda: tiny_llama(vocab_size=VOCABULARY),
    "no tokenizer": lambda: tiny_llama(vocab_size=VOCABULARY),
    "other vocabulary": lambda: tiny_llama(vocab_size=200),
    "gpt2": lambda: tiny_gpt2(vocab_size=VOCABULARY),
    "mixtral": lambda: tiny_mixtral(vocab_size=VOCABULARY),
    "gpt-oss": gpt_oss,
    "encoder": lambda: BertModel(tiny_bert(vocab_size=VOCABULARY).config),
    "clip": clip,
    "whisper": whisper,
    "vit": tiny_vit,
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Models that are made when a test first asks for them, text, and recipes."""
    home = tmp_path_factory.mktemp("check")
    text = home / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"the cat sat on mat {n} and saw what a dog had done"}) + "\n" for n in range(40))
    )

    def model(name):
        folder = home / name.replace(" ", "-")
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                MODELS[name]().save_pretrained(folder)
            if name not in ("no tokenizer", "whisper", "vit"):
                tiny_tokenizer().save_pretrained(folder)
        return folder

    def recipe(steps, **sections):
        path = home / "recipe.json"
        path.write_text(json.dumps({"steps": steps, "calibration": {"samples": 4, "seq_len": 16}, **sections}))
        return path

    return SimpleNamespace(home=home, text=text, model=model, recipe=recipe)


def call(capsys, *words):
    """Return the exit status of a command and the line in which it says what is wrong."""
    status = main([str(word) for word in words])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-optim: ")]
    return status, errors[-1] if errors else ""


TRAINING = {"training": {"max_steps": 2, "per_device_train_batch_size": 2}}
CASES = {
    "layers that cannot be stored": ("gpt2", ["rtn"], {}, "text"),
    "experts that stock cannot read": ("gpt-oss", ["gptq"], {}, "text"),
    "experts that the technique leaves out": ("mixtral", ["zeroquant"], {}, "text"),
    "experts, in training": ("mixtral", ["qat"], TRAINING, "text"),
    "a mixture made of a mixture": ("mixtral", ["upcycle"], {}, "text"),
    "no class with experts": ("gpt2", ["upcycle"], {}, "text"),
    "no neurons": ("gpt-oss", [{"technique": "structured", "neurons": 0.25}], {}, "text"),
    "more layers than there are": ("llama", [{"technique": "structured", "layers": 2}], {}, "text"),
    "layers of a student": ("llama", [{"technique": "distilbert", "layers": [0, 7]}], TRAINING, "text"),
    "a layer that is too wide": ("llama", [{"technique": "obq", "widest": 16}], {}, "text"),
    "a pattern without a match": ("llama", [{"technique": "nm", "targets": ["*.nope"]}], {}, "text"),
    "cross-attention": ("whisper", ["local"], {}, None),
    "two towers": ("clip", ["local"], {}, None),
    "no task to train on": ("encoder", ["gmp"], TRAINING, "text"),
    "training without labels": ("vit", ["gmp"], TRAINING, "random"),
    "a loss of zero": ("llama", [{"technique": "logit_kd", "alpha": 1.0}], TRAINING, "text"),
    "a missing teacher": ("llama", [{"technique": "logit_kd", "teacher": "/no/such/teacher"}], TRAINING, "text"),
    "no teacher": ("llama", [{"technique": "logit_kd", "teacher": None}], TRAINING, "text"),
    "a teacher of other classes": (
        "llama",
        [{"technique": "logit_kd", "teacher": "other vocabulary"}],
        TRAINING,
        "text",
    ),
    "training without a tokenizer": ("no tokenizer", ["gmp"], TRAINING, "text"),
    "calibration without a tokenizer": ("no tokenizer", ["gptq"], {}, "text"),
    "an input that the data lacks": ("whisper", ["gptq"], {}, "random"),
    "too little text": ("llama", ["gptq"], {"calibration": {"samples": 4000}}, "text"),
    "an argument of training": ("llama", ["gmp"], {"training": {"max_stepz": 3}}, "text"),
    "an optimizer that is not installed": ("llama", ["gmp"], {"training": {"optim": "stable_adamw"}}, "text"),
    "steps that do not compose": ("llama", ["smoothquant"], {}, "text"),
}


@pytest.mark.many
@pytest.mark.parametrize("case", CASES)
def test_check_refuses_what_compress_refuses_in_the_same_words(shop, capsys, case):
    name, steps, sections, data = CASES[case]
    model = shop.model(name)
    steps = [step if isinstance(step, dict) else {"technique": step} for step in steps]
    for step in steps:
        if step.get("teacher") == "other vocabulary":
            step["teacher"] = str(shop.model("other vocabulary"))
    recipe = shop.recipe(steps, **sections)
    given = ["--calibration", shop.text if data == "text" else data] if data else []
    refused, why = call(capsys, "check", recipe, "--model", model, "--device", "cpu", *given)
    output = shop.home / "out"
    failed, reason = call(capsys, "compress", model, "--recipe", recipe, "--output", output, "--device", "cpu", *given)
    assert (refused, failed) == (1, 2), (why, reason)
    assert why == reason
    assert "Error" not in why
    assert not output.exists()


def test_the_first_refusal_names_the_step_in_python_too(shop):
    """What a step refuses in the middle of its work is refused before it, by the same code."""
    from transformers import AutoModelForCausalLM

    import hf_optim

    model = AutoModelForCausalLM.from_pretrained(shop.model("mixtral"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"step 2 \(zeroquant\) cannot store integer weights of MixtralForCausalLM"):
        hf_optim.optimize(model, ["magnitude", "zeroquant"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(OptimError, match=r"step 1 \(rtn\): nothing matches '\*\.nope'.* in LlamaForCausalLM"):
        hf_optim.optimize(tiny_llama(), [{"technique": "rtn", "targets": ["*.nope"]}])


# -- exit statuses ----------------------------------------------------------------------------------------------------
def test_exit_statuses_have_one_meaning_each(shop, capsys, monkeypatch):
    good, refused = shop.recipe([{"technique": "nm"}]), shop.home / "refused.json"
    refused.write_text(json.dumps([{"technique": "smoothquant"}]))
    broken = shop.home / "broken.yaml"
    broken.write_text("steps: [")
    for extra in ((), ("--json",)):
        assert main(["check", str(good), *extra]) == 0
        assert main(["check", str(refused), *extra]) == 1
        assert main(["check", str(broken), *extra]) == 1
        # The recipe or the model is not there to be checked.
        assert main(["check", "no-such-recipe", *extra]) == 2
        assert main(["check", str(shop.home / "nothere.yaml"), *extra]) == 2
        assert main(["check", str(good), "--model", "/no/such/dir", *extra]) == 2
    assert main(["check", str(good), "--time"]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["check"])
    assert ended.value.code == 2

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_optim.cli.check.run", interrupt)
    assert main(["check", str(good)]) == 130
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "0 success; 1 a negative answer (`check` refuses the recipe" in printed
    assert "130 interrupted" in printed


def test_a_refusal_as_json_says_whether_the_steps_compose(shop, capsys):
    words = ["check", shop.recipe([{"technique": "rtn"}]), "--model", shop.model("gpt2"), "--json"]
    assert main([str(word) for word in words]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["accepted"], report["composes"]) == (False, True)
    assert "Conv1D" in report["reason"]


# -- what is printed --------------------------------------------------------------------------------------------------
def test_data_is_needed_named_or_not_needed_and_nothing_contradicts_it(shop, capsys):
    recipe = shop.recipe([{"technique": "gmp"}, {"technique": "gptq"}], **TRAINING)
    assert main(["check", str(recipe), "--model", str(shop.model("llama")), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    first, second = (next(line for line in printed.splitlines() if line.startswith(f"{n} ")) for n in (1, 2))
    assert first.split("  ")[-1].strip() == "needed (--train DATA)"
    assert "needed (--calibration DATA)" in second
    assert "no data" not in printed
    words = ["check", recipe, "--model", shop.model("llama"), "--device", "cpu", "--calibration", shop.text]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert str(shop.text) in printed
    assert "calibration (stage 2)" in printed
    assert "training memory (stage 1)" in printed
    assert "accelerator" not in printed


def test_a_recipe_without_data_says_so_once(shop, capsys):
    assert main(["check", str(shop.recipe([{"technique": "rtn"}])), "--model", str(shop.model("clip"))]) == 0
    printed = capsys.readouterr().out
    assert "no data needed" in printed
    assert printed.count("not needed") == 2


def test_check_from_python_returns_the_costs(shop):
    report = check([{"technique": "gmp"}], str(shop.model("llama")))
    assert report["accepted"] is True
    (stage,) = report["model"]["stages"]
    assert stage["kind"] == "training"
    assert stage["training_steps"] is None  # no data is named, and the recipe has no max_steps
    json.dumps(report)


def test_time_is_measured_on_steps_of_the_recipe(shop, capsys):
    recipe = shop.recipe([{"technique": "nm"}], training={})
    words = ["check", recipe, "--model", shop.model("llama"), "--device", "cpu", "--calibration", shop.text, "--json"]
    two = OptimConfig.parse([{"technique": "gmp"}, {"technique": "gptq", "group_size": 16}])
    recipe.write_text(
        json.dumps(
            {
                **two.to_dict(),
                "calibration": {"samples": 4, "seq_len": 16},
                "training": {"max_steps": 400, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            }
        )
    )
    assert main([str(word) for word in (*words, "--time")]) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    training, calibration = time["stages"]
    assert training["steps"] == ["gmp"]
    assert training["units"] == 400
    assert calibration["units"] == 2
    for stage in (training, calibration):
        assert 0 < stage["low"] <= stage["seconds"] <= stage["high"]
    assert time["low"] <= time["seconds"] <= time["high"]
    assert time["seconds"] >= training["seconds"] + calibration["seconds"]
    assert time["peak_host_bytes"] > 10**8
