"""Evaluation: reference results on real models, and every task on tiny ones."""

from __future__ import annotations

import io
import itertools
import json
import math
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, BertTokenizer

from hf_optim import CheckpointError, DataConfig, DataError
from hf_optim.data.datasets import load_texts
from hf_optim.data.tasks import task_of, task_of_model
from hf_optim.evaluation import evaluate, latency, sizes
from hf_optim.runs.memory import PeakMemory

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 6, "Pack my box with five dozen jugs. " * 5]


def real(shared_models, name):
    folder = shared_models / name
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# -- reference results -----------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.parametrize(("name", "expected"), [("babyllama-1m", 2.2251), ("stories260k", 4.3563)])
def test_the_reference_perplexities(shared_models, shared_data, name, expected):
    model, tokenizer = real(shared_models, name)
    data = DataConfig(str(shared_data / "tinystories/eval.jsonl"), samples=None)
    found = evaluate.evaluate(model, tokenizer, data, speed=False)
    assert round(found["perplexity"], 4) == expected
    assert found["nll"] == pytest.approx(math.log(found["perplexity"]), rel=1e-12)


@pytest.mark.real_model
def test_rounding_the_weights_gives_the_reference_perplexity(shared_models, shared_data):
    model, tokenizer = real(shared_models, "stories260k")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            with torch.no_grad():
                scale = module.weight.abs().amax(1, keepdim=True) / 7
                module.weight.copy_((module.weight / scale).round().clamp(-7, 7) * scale)
    stories = load_texts(DataConfig(str(shared_data / "tinystories/eval.jsonl")))
    assert round(evaluate.evaluate_lm(model, tokenizer, stories)["perplexity"], 4) == 5.1329


# -- language models --------------------------------------------------------------------------------------------------


def by_hand(model, ids, length):
    rows = ids[: len(ids) // length * length].view(-1, length)
    with torch.no_grad():
        out = model(input_ids=rows).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten()).item()


@pytest.mark.real_model
@pytest.mark.smoke
def test_a_part_of_the_data_has_the_perplexity_of_the_plain_formula(shared_models, shared_data):
    model, tokenizer = real(shared_models, "stories260k")
    stories = list(itertools.islice(load_texts(DataConfig(str(shared_data / "tinystories/eval.jsonl"))), 24))
    ids = torch.tensor([i for story in stories for i in tokenizer(story, verbose=False)["input_ids"]])
    found = evaluate.evaluate_lm(model, tokenizer, stories)
    assert found["nll"] == pytest.approx(by_hand(model, ids, model.config.max_position_embeddings), rel=1e-6)
    assert 4 < found["perplexity"] < 4.8  # of all stories 4.3563


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral])
def test_perplexity_is_the_plain_formula(make):
    model, tokenizer = make(vocab_size=259), tiny_tokenizer()
    model.train()
    ids = torch.tensor([i for t in TEXTS for i in tokenizer(t, verbose=False)["input_ids"]])
    found = evaluate.evaluate_lm(model, tokenizer, TEXTS)
    assert model.training
    assert found["nll"] == pytest.approx(by_hand(model.eval(), ids, 64), rel=1e-6)
    assert found["tokens"] == len(ids) // 64 * 63
    size = sum(len(t.encode()) for t in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / math.log(2) * len(ids) / size, rel=1e-9)


def test_a_text_shorter_than_one_sequence_is_scored():
    model, tokenizer = tiny_llama(vocab_size=259), tiny_tokenizer()
    assert evaluate.evaluate_lm(model, tokenizer, ["short"])["tokens"] == 5
    with pytest.raises(DataError, match="has 0 tokens"):
        evaluate.evaluate_lm(model, tokenizer, [])


def test_sampled_sequences_agree_with_perplexity_of_token_ids():
    model, tokenizer = tiny_llama(vocab_size=259), tiny_tokenizer()
    found = evaluate.evaluate_lm(model, tokenizer, TEXTS, seq_len=16, samples=4, seed=1)
    assert found["tokens"] == 60
    assert found == evaluate.evaluate_lm(model, tokenizer, TEXTS, seq_len=16, samples=4, seed=1)
    from hf_optim.data.token_sequences import sample_sequences

    ids = sample_sequences(TEXTS, tokenizer, 16, 4, 1)
    assert evaluate.perplexity(model, ids)["perplexity"] == pytest.approx(found["perplexity"], rel=1e-9)


def test_agreement_with_a_reference(tmp_path):
    model, other, tokenizer = tiny_llama(vocab_size=259), tiny_llama(seed=1, vocab_size=259), tiny_tokenizer()
    same = evaluate.evaluate_lm(model, tokenizer, TEXTS, reference=model)
    assert (same["top1_agreement"], same["kl"]) == (1.0, 0.0)
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    data = DataConfig(str(file), samples=None)
    apart = evaluate.compare(model, other, tokenizer, data)
    assert 0 <= apart["top1_agreement"] < 0.5
    assert apart["kl"] > 0.1
    assert apart != evaluate.compare(other, model, tokenizer, data)
    with pytest.raises(DataError, match="cannot be compared"):
        evaluate.compare(model, tiny_llama(vocab_size=300), tokenizer, data)


def test_evaluate_times_models_that_generate(tmp_path):
    file = tmp_path / "eval.txt"
    file.write_text(TEXTS[0])
    found = evaluate.evaluate(tiny_llama(vocab_size=259), tiny_tokenizer(), DataConfig(str(file), samples=2))
    assert found["task"] == "text-generation"
    assert 0 < found["ms_per_token"] < 1000
    assert found["ms_per_token_iqr"] >= 0
    assert 2 <= found["time_rounds"] <= 15
    assert "ms_per_token" not in evaluate.evaluate(
        tiny_llama(vocab_size=259), tiny_tokenizer(), DataConfig(str(file), samples=2), speed=False
    )
    with pytest.raises(DataError, match="pass tokenizer"):
        evaluate.evaluate(tiny_llama(), None, DataConfig(str(file)))


# -- other tasks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def wordpieces(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    return BertTokenizer(str(file))


def test_classification_accuracy_is_over_the_right_labels(tmp_path, wordpieces):
    model = tiny_bert()
    sentences = ["a b c", "d", "e f g h i", "j a"] * 4
    with torch.no_grad():
        right = [model(**wordpieces(s, return_tensors="pt")).logits.argmax().item() for s in sentences]
    labels = [*right[:12], *[(label + 1) % 3 for label in right[12:]]]
    file = tmp_path / "dev.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{s}\t{n}\n" for s, n in zip(sentences, labels, strict=True)))
    data = DataConfig(str(file), samples=None)
    assert evaluate.evaluate(model, wordpieces, data, speed=False) == {"task": "text-classification", "accuracy": 0.75}
    assert evaluate.compare(model, model, wordpieces, data)["top1_agreement"] == 1.0
    file.write_text("sentence\tlabel\na\t9\n")
    with pytest.raises(DataError, match="label 9 is not one of the model's 3 classes"):
        evaluate.evaluate(model, wordpieces, data, speed=False)
    file.write_text("sentence\tgrade\na\t1\n")
    with pytest.raises(DataError, match="needs a column label"):
        evaluate.evaluate(model, wordpieces, data, speed=False)


def test_similarity_is_spearman_of_mean_pooled_cosines(tmp_path, wordpieces):
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    model = BertModel(config).eval()
    pairs = [("a b", "c d e"), ("a", "a"), ("f g h", "f g"), ("j", "a b c d")]
    cosines = []
    with torch.no_grad():
        for pair in pairs:
            one, two = (model(**wordpieces(s, return_tensors="pt")).last_hidden_state.mean(1) for s in pair)
            cosines.append(torch.cosine_similarity(one, two).item())
    file = tmp_path / "sts.tsv"
    lines = [f"{a}\t{b}\t{c**3 if c > 0 else c}\n" for (a, b), c in zip(pairs, cosines, strict=True)]
    file.write_text("sentence1\tsentence2\tscore\n" + "".join(lines))
    found = evaluate.evaluate(model, wordpieces, DataConfig(str(file), samples=None), speed=False)
    assert found["spearman"] == pytest.approx(1.0, abs=1e-12)
    assert found["pairs"] == 4
    file.write_text("text\na\n")
    with pytest.raises(DataError, match="no metric for BertModel"):
        evaluate.evaluate(model, wordpieces, DataConfig(str(file)))


def test_masked_language_models_predict_the_masked_tokens(tmp_path, wordpieces):
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    model = BertForMaskedLM(config).eval()
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps({"text": "a b c d e f g h i j " * 20}) + "\n" for _ in range(4)))
    data = DataConfig(str(file), samples=None, seq_len=32)
    found = evaluate.evaluate(model, wordpieces, data, speed=False)
    # 26 sequences of 30 tokens that are not special; 15 % of them are hidden.
    assert 80 < found["tokens"] < 160
    assert 0 <= found["accuracy"] <= 1
    assert found == evaluate.evaluate(model, wordpieces, data, speed=False)
    with torch.no_grad():
        model.cls.predictions.decoder.bias.fill_(-1e4)
        model.cls.predictions.decoder.bias[5] = 1e4
    assert evaluate.evaluate(model, wordpieces, data, speed=False)["accuracy"] == pytest.approx(0.1, abs=0.1)


def test_image_classification(tmp_path):
    from datasets import Dataset
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    def picture(i):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 7 * i)).save(file, "PNG")
        return file.getvalue()

    model, processor = tiny_vit(), ViTImageProcessorPil(size={"height": 16, "width": 16})
    images = [picture(i) for i in range(10)]
    opened = [Image.open(io.BytesIO(i)) for i in images]
    with torch.no_grad():
        right = model(**processor(opened, return_tensors="pt")).logits.argmax(-1).tolist()
    labels = [(right[0] + 1) % 3, *right[1:]]
    file = tmp_path / "images.parquet"
    Dataset.from_dict({"image": [{"bytes": i, "path": None} for i in images], "label": labels}).to_parquet(file)
    found = evaluate.evaluate(model, processor, DataConfig(str(file), samples=None), speed=False)
    assert found == {"task": "image-classification", "accuracy": 0.9}


def test_encoder_decoders_score_the_target(tmp_path):
    model, tokenizer = tiny_t5(vocab_size=259), tiny_tokenizer()
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"source": f"input {i}", "target": "out" * (i + 1)}) + "\n" for i in range(3)))
    found = evaluate.evaluate(model, tokenizer, DataConfig(str(file), samples=None), speed=False)
    assert found["tokens"] == sum(len(tokenizer("out" * (i + 1))["input_ids"]) for i in range(3))
    # Padding of a batch must not reach the score.
    single = 0.0
    for i in range(3):
        source = tokenizer(f"input {i}", return_tensors="pt")
        labels = tokenizer("out" * (i + 1), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            inputs = {k: source[k] for k in ("input_ids", "attention_mask")}
            single += model(**inputs, labels=labels).loss.item() * labels.numel()
    assert found["nll"] == pytest.approx(single / found["tokens"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "tag", "auto"),
    [
        ("LlamaForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        ("BertForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("ViTForImageClassification", "image-classification", "AutoModelForImageClassification"),
        ("T5ForConditionalGeneration", "text2text-generation", "AutoModelForSeq2SeqLM"),
        ("BertForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        ("BertModel", "feature-extraction", "AutoModel"),
    ],
)
def test_tasks_by_class_name(name, tag, auto):
    assert (task_of(name).tag, task_of(name).auto_class) == (tag, auto)


def test_a_subclass_has_the_task_of_its_parent():
    model = tiny_llama()
    model.__class__ = type("MyLlama", (type(model),), {})
    assert task_of_model(model).tag == "text-generation"


# -- size, memory, speed ----------------------------------------------------------------------------------------------


def test_bytes_on_disk_are_those_of_the_safetensors(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "training_args.bin").write_bytes(b"x" * 1000)
    assert sizes.bytes_on_disk(tmp_path) == sum(s.stat().st_size for s in shards)
    with pytest.raises(CheckpointError, match="no safetensors"):
        sizes.bytes_on_disk(tmp_path / "none")


def test_parameter_bytes_count_shared_storage_once():
    plain, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    assert sizes.parameter_bytes(plain) - sizes.parameter_bytes(tied) == 64 * 32 * 4
    expected = sum(t.numel() * t.element_size() for t in (*plain.parameters(), *plain.buffers()))
    # inv_freq and its original copy may share one storage.
    assert expected * 0.99 < sizes.parameter_bytes(plain) <= expected


def test_peak_memory_names_its_device():
    with PeakMemory(torch.device("cpu")) as peak:
        block = torch.ones(40_000_000)
    assert peak.bytes > block.numel() * 4
    assert peak.metrics()["device"] == "cpu"


def test_peak_memory_of_a_child_process_is_its_own():
    """Not that of the process that started it, which ``ru_maxrss`` of the child begins with."""
    code = "from hf_optim.runs.memory import PeakMemory\nwith PeakMemory() as peak: pass\nprint(peak.bytes)"
    block = torch.ones(200_000_000)  # 800 MB
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < block.numel() * 4


def test_time_per_token_generates_that_many_and_restores_the_model(monkeypatch):
    model = tiny_llama(eos_token_id=2)
    made, stock = [], model.generate

    def generate(ids, **kwargs):
        out = stock(ids, **kwargs)
        made.append(out.shape[1] - ids.shape[1])
        return out

    model.generate = generate
    model.train()
    config = model.generation_config.to_dict()
    workload = latency.workload_of(model)
    monkeypatch.setattr(latency, "ROUND_SECONDS", 0)
    assert latency.time_models({"model": model}, workload, max_rounds=2)["model"].median > 0
    # The context of 64 tokens holds 16 + 32. A short warm-up, a call that is counted, and two rounds.
    assert made == [8, 32, 32, 32]
    assert (workload.key, workload.units) == ("ms_per_token", 32)
    assert model.training
    assert model.generation_config.to_dict() == config


@pytest.mark.parametrize(("seconds", "calls"), [(0.0001, 100), (0.01, 5), (0.04, 1), (3.0, 1)])
def test_a_round_repeats_short_calls(seconds, calls, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    class Work(latency.Workload):
        def action(self, model, new_tokens=None):
            def run():
                model.append(now[0])
                now[0] += seconds

            return run

    monkeypatch.setattr(latency, "eval_mode", lambda model: nullcontext())
    made = []
    work = Work("ms_per_example", 8, {}, None, "w")
    timing = latency.time_models({"model": made}, work, min_rounds=2, max_rounds=2)["model"]
    assert len(made) == 1 + 1 + 2 * calls
    assert timing.median == pytest.approx(1000 * seconds / 8)


@pytest.mark.parametrize(
    ("build", "shape", "description"),
    [
        (tiny_bert, (8, 60), "forward pass over a batch of 8 of 60 tokens"),
        (tiny_vit, (8, 3, 16, 16), "forward pass over a batch of 8"),
        (tiny_t5, (8, 8), "forward pass over a batch of 8"),
    ],
)
def test_models_that_generate_no_text_are_timed_per_example(build, shape, description, monkeypatch):
    model = build()
    monkeypatch.setattr(latency, "ROUND_SECONDS", 0)
    workload = latency.workload_of(model)
    assert (workload.key, workload.units, workload.description) == ("ms_per_example", 8, description)
    assert workload.inputs[model.main_input_name].shape == shape
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(module.training), with_kwargs=True)
    timing = latency.time_models({"model": model.train()}, workload, max_rounds=2)["model"]
    assert timing.median > 0
    assert seen == [False] * 4
    assert model.training
