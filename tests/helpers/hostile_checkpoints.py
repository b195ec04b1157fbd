"""Checkpoints of a stranger: files that are not what they seem, and code that leaves a mark if it runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def build(home: Path) -> Path:
    """Write a tiny Llama with its tokenizer in one file."""
    tiny_llama(vocab_size=259, num_hidden_layers=1).save_pretrained(home)
    tiny_tokenizer().save_pretrained(home)
    return home


class Canary:
    """Python code that creates a file: ``ran`` says whether it was executed."""

    def __init__(self, home: Path) -> None:
        self.mark = home / "canary"

    @property
    def ran(self) -> bool:
        return self.mark.exists()

    @property
    def text(self) -> str:
        line = f"import pathlib\npathlib.Path({str(self.mark)!r}).touch()\n"
        names = ("Evil", "generate")
        return line + "".join(f"class {name}:\n    pass\n" for name in names)

    def pickled(self) -> bytes:
        class Bomb:
            def __reduce__(bomb):
                return os.system, (f"touch {self.mark}",)

        return pickle.dumps(Bomb())


def edit_json(path: Path, **fields) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | fields))


def sharded(home: Path, *names: str) -> None:
    """Replace the weights by an index that places the tensors in these files, in turn; the first file holds them."""
    keys = sorted(load_file(home / SINGLE))
    weight_map = {key: names[i % len(names)] for i, key in enumerate(keys)}
    (home / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (home / SINGLE).rename(home / "model-1.safetensors")


# -- weights: each function spoils a checkpoint, and returns the name that the error must mention ----------------------
def pickle_only(home, canary):
    (home / SINGLE).unlink()
    (home / "pytorch_model.bin").write_bytes(canary.pickled())
    return "pytorch_model.bin"


def pickle_with_index(home, canary):
    (home / SINGLE).unlink()
    (home / "shard.bin").write_bytes(canary.pickled())
    (home / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"a": "shard.bin"}}')
    return "shard.bin"


def index_to_pickle(home, canary):
    sharded(home, "shard.bin")
    (home / "shard.bin").write_bytes(canary.pickled())
    return "shard.bin"


def index_to(name):
    def spoil(home, canary):
        sharded(home, "model-1.safetensors", name)
        return name

    return spoil


def index_outside(home, canary):
    other = home.parent / "other.safetensors"
    shutil.copy(home / SINGLE, other)
    sharded(home, "../other.safetensors")
    return "../other.safetensors"


def index_to_directory(home, canary):
    sharded(home, "model-1.safetensors", "folder.safetensors")
    (home / "folder.safetensors").mkdir()
    return "folder.safetensors"


def index_to_pipe(home, canary):
    sharded(home, "model-1.safetensors", "pipe.safetensors")
    os.mkfifo(home / "pipe.safetensors")
    return "pipe.safetensors"


def weights_are_a_pipe(home, canary):
    (home / SINGLE).unlink()
    os.mkfifo(home / SINGLE)
    return SINGLE


def linked(target):
    def spoil(home, canary):
        (home / SINGLE).unlink()
        (home / SINGLE).symlink_to(target)
        return SINGLE

    return spoil


def linked_outside(home, canary):
    (home / SINGLE).rename(home.parent / "elsewhere.safetensors")
    (home / SINGLE).symlink_to("../elsewhere.safetensors")
    return SINGLE


def tokenizer_linked_outside(home, canary):
    (home.parent / "private.json").write_text("{}")
    (home / "special_tokens_map.json").unlink(missing_ok=True)
    (home / "special_tokens_map.json").symlink_to("../private.json")
    return "special_tokens_map.json"


def wrong_case(home, canary):
    sharded(home, "Model-1.safetensors")
    return "Model-1.safetensors"


def doubled_tensors(home, canary):
    sharded(home, "model-1.safetensors", "model-2.safetensors")
    state = load_file(home / "model-1.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"]}, home / "model-2.safetensors", {"format": "pt"})
    return "model-2.safetensors"


def truncated(home, canary):
    path = home / SINGLE
    path.write_bytes(path.read_bytes()[:-100])
    return SINGLE


def long_header(home, canary):
    path = home / SINGLE
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    return SINGLE


def named_weights(name):
    def spoil(home, canary):
        (home / "extra.bin").write_bytes(canary.pickled())
        (home / "adapter_model.bin").write_bytes(canary.pickled())
        edit_json(home / "config.json", transformers_weights=name)
        return name

    return spoil


def pickled_adapter(home, canary):
    edit_json(
        home / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(home), target_modules=["q_proj"]
    )
    (home / "adapter_model.bin").write_bytes(canary.pickled())
    return "adapter_model.safetensors"


def distributed_checkpoint(home, canary):
    shutil.copy(home / SINGLE, home / "shard-00001-model-00001-of-00001.safetensors")
    return "distributed checkpoint"


def corrupt_index(home, canary):
    sharded(home, "model-1.safetensors")
    (home / INDEX).write_text('{"weight_map": ' + "[" * 100_000)
    return INDEX


WEIGHTS = {
    "pickle only": pickle_only,
    "pickles with an index": pickle_with_index,
    "an index that names a pickle": index_to_pickle,
    "an index that names a device": index_to("/dev/zero"),
    "an index that names a private file": index_to("/etc/passwd"),
    "an index that names a file outside": index_outside,
    "an index that names a directory": index_to_directory,
    "an index that names a pipe": index_to_pipe,
    "an index that names a missing shard": index_to("model-2.safetensors"),
    "an index that ignores case": wrong_case,
    "an index that is corrupt": corrupt_index,
    "weights that are a pipe": weights_are_a_pipe,
    "weights that link to a device": linked("/dev/zero"),
    "weights that link outside": linked_outside,
    "a configuration that links outside": tokenizer_linked_outside,
    "a tensor in two shards": doubled_tensors,
    "a truncated file": truncated,
    "a header of absurd length": long_header,
    "a configuration that names a pickle": named_weights("extra.bin"),
    "a configuration that names the pickle of an adapter": named_weights("adapter_model.bin"),
    "a configuration that names a file outside": named_weights("../other.safetensors"),
    "an adapter that is a pickle": pickled_adapter,
    "a distributed checkpoint": distributed_checkpoint,
}


# -- code: each function adds code that a stock class does not need ----------------------------------------------------
def _map(path: Path, reference: str, *autos: str) -> None:
    edit_json(path, auto_map=dict.fromkeys(autos, reference))


AUTOS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


def own_module(home, canary):
    (home / "evil.py").write_text(canary.text)
    _map(home / "config.json", "evil.Evil", *AUTOS)


def foreign_module(home, canary):
    other = home.parent / "other"
    other.mkdir()
    (other / "evil.py").write_text(canary.text)
    _map(home / "config.json", f"{other}--evil.Evil", *AUTOS)


def tokenizer_module(home, canary):
    (home / "evil.py").write_text(canary.text)
    edit_json(home / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})


def foreign_tokenizer(home, canary):
    other = home.parent / "other"
    other.mkdir()
    (other / "evil.py").write_text(canary.text)
    reference = f"{other}--evil.Evil"
    edit_json(home / "tokenizer_config.json", auto_map={"AutoTokenizer": [reference, reference]})


def custom_generate(home, canary):
    (home / "custom_generate").mkdir()
    (home / "custom_generate" / "generate.py").write_text(canary.text)


def unknown_model(home, canary):
    own_module(home, canary)
    edit_json(home / "config.json", model_type="evil", architectures=["Evil"])


CODE = {
    "a module in the checkpoint": own_module,
    "a module of another repository": foreign_module,
    "a tokenizer's module": tokenizer_module,
    "a tokenizer's module in another repository": foreign_tokenizer,
    "a generate function": custom_generate,
    "a model that no stock class loads": unknown_model,
}
