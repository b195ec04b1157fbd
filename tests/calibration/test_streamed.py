"""The streamed driver writes bitwise the same as the blockwise driver, with one block in memory at a time."""

from __future__ import annotations

import gc

import pytest
import torch
from streamed_and_blockwise import assert_same_checkpoint, blockwise, random_batches, recipe_of, streamed, tensors_of
from terminal import bars_allowed, terminal
from tiny_models import TINY, tiny_llama, tiny_mixtral
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import Contract, ModelError, RecipeError, Reload, Technique, hookimpl, technique
from hf_optim.calibration.streamed import activation_store
from hf_optim.checkpoints import meta_model
from hf_optim.checkpoints.reader import Checkpoint
from hf_optim.checkpoints.source import ModelSource
from hf_optim.cli.jobs.compress import Job, compress
from hf_optim.runs.record import Record
from hf_optim.toolkit import topology

RTN = ({"technique": "rtn", "bits": 4, "group_size": 16},)
GPTQ = ({"technique": "gptq", "bits": 4, "group_size": 16},)
STATIC = ({"technique": "rtn", "bits": 8, "activations": "int8", "dynamic": False},)
SMOOTH = ({"technique": "smoothquant"}, {"technique": "rtn", "bits": 8, "activations": "int8"})
PRUNED = ({"technique": "nm", "score": "activation"}, *GPTQ)
SIGNROUND = ({"technique": "signround", "bits": 3, "group_size": 16, "steps": 8},)
HEAD = ({"technique": "gptq", "bits": 8, "targets": ["Linear", "lm_head"]},)

CASES = {
    "llama, rtn": ("llama", RTN),
    "llama, gptq": ("llama", GPTQ),
    "llama, signround": ("llama", SIGNROUND),
    "llama, smoothquant + rtn": ("llama", SMOOTH),
    "llama, nm + gptq": ("llama", PRUNED),
    "llama, the head too": ("llama", HEAD),
    "bert, asymmetric gptq": ("bert", ({**GPTQ[0], "symmetric": False},)),
    "bert, smoothquant + rtn": ("bert", SMOOTH),
    "qwen2, tied embeddings": ("qwen2", GPTQ),
    "opt, static activations": ("opt", STATIC),
    "opt, the tied head": ("opt", HEAD),
    "gpt2, pruned alone": ("gpt2", PRUNED[:1]),
    "vit, renamed tensors": ("vit", STATIC),
    "t5, blocks that return more than a hidden state": ("t5", STATIC),
    "mixtral, merged experts, pruned alone": ("mixtral", PRUNED[:1]),
}


@technique("onlooker", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
class Onlooker(Technique):
    """Records what is materialized in each scope, halves the weights of the block, and can break the rules.

    Attributes:
        teacher: request reference outputs, and record their sums.
        trespass: write into a parameter outside the block.
        whole: request all blocks at once.
    """

    teacher: bool = False
    trespass: bool = False
    whole: bool = False

    def needs_whole_model(self) -> bool:
        return self.whole

    def needs_teacher(self) -> bool:
        return self.teacher

    @hookimpl
    def calibrate(self, run, scope):
        state = run.state(self)
        real = [name for name, p in scope.model.named_parameters() if not p.is_meta]
        state.outside = [*getattr(state, "outside", []), sorted({name for name in real if not scope.holds(name)})]
        state.references = [
            *getattr(state, "references", []),
            [
                (float(example.args[0].double().sum()), float(_first(example.output).double().sum()))
                for example in scope.teacher
            ],
        ]
        yield
        if self.trespass:
            with torch.no_grad():
                scope.model.get_input_embeddings().weight.mul_(2.0)
        for linear in scope.linears.values():
            with torch.no_grad():
                linear.weight.mul_(0.5)
        run.cover(self, scope.linears)


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Skip the plots of the cards, which take longer than everything else here."""
    monkeypatch.setattr("hf_optim.evaluation.cards.card.Card._draw_plots", lambda self, directory: [])


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Tiny checkpoints with several shards each."""
    made = {}

    def home(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            TINY[name]().save_pretrained(made[name], max_shard_size="20KB")
        return made[name]

    return home


@pytest.mark.many
@pytest.mark.parametrize("case", CASES)
def test_it_writes_what_the_blockwise_driver_writes(case, homes, tmp_path):
    name, steps = CASES[case]
    home, batches = homes(name), random_batches(TINY[name]())
    ours = streamed(home, steps, batches, tmp_path / "ours")
    theirs = hf_optim.run_of(blockwise(home, steps, batches, tmp_path / "theirs"))
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    assert ours.record.steps == theirs.record.steps
    assert ours.record.coverage == theirs.record.coverage
    assert ours.record.notes == theirs.record.notes
    cls = type(TINY[name]())
    with torch.no_grad():
        reloaded = [cls.from_pretrained(tmp_path / which).eval()(**batches[0])[0] for which in ("ours", "theirs")]
    assert torch.equal(*reloaded)


def test_activations_can_be_offloaded_to_disk(homes, tmp_path):
    spill = tmp_path / "spill"
    spill.mkdir()
    batches = random_batches(tiny_llama())
    seen = []
    stock = activation_store.ActivationStore._write

    def write(self, number, leaves):
        kept = stock(self, number, leaves)
        seen.extend(path.stat().st_size for path in spill.rglob("*.activations"))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_store.ActivationStore, "_write", write)
        streamed(homes("llama"), GPTQ, batches, tmp_path / "spilled", spill=str(spill))
    assert set(seen) == {2 * 7 * 32 * 4}  # a batch of two rows, seven tokens, width 32, float32
    assert not list(spill.iterdir())
    streamed(homes("llama"), GPTQ, batches, tmp_path / "held")
    assert_same_checkpoint(tmp_path / "spilled", tmp_path / "held")


def test_only_the_current_block_is_materialized(homes, tmp_path):
    step = Onlooker()
    run = streamed(homes("llama"), [step], random_batches(tiny_llama()), tmp_path / "out")
    assert run.state(step).outside == [[], []]
    assert all(parameter.is_meta for parameter in run.model.parameters())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_references_are_the_outputs_of_the_unmodified_blocks(name, homes, tmp_path):
    ours, theirs = Onlooker(teacher=True), Onlooker(teacher=True)
    batches = random_batches(TINY[name]())
    found = streamed(homes(name), [ours], batches, tmp_path / "ours").state(ours).references
    expected = hf_optim.run_of(blockwise(homes(name), [theirs], batches, tmp_path / "theirs")).state(theirs).references
    assert found == expected
    assert len(found) == len(topology.blocks(TINY[name]()))
    assert all(len(references) == len(batches) for references in found)
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "theirs")


def test_a_write_outside_the_block_is_refused(homes, tmp_path):
    with pytest.raises(ModelError, match=r"changed model\.embed_tokens\.weight while model\.layers\.0 .*blockwise"):
        streamed(homes("llama"), [Onlooker(trespass=True)], random_batches(tiny_llama()), tmp_path / "out")


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_meta_model_is_the_model_without_weights(name, homes):
    built = meta_model.build(ModelSource(str(homes(name)))).model
    loaded = type(built).from_pretrained(homes(name))
    assert {n: (p.shape, p.dtype) for n, p in built.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in loaded.named_parameters()
    }
    assert all(parameter.is_meta for parameter in built.parameters())
    computed = dict(loaded.named_non_persistent_buffers())
    for key, buffer in built.named_non_persistent_buffers():
        assert torch.equal(buffer, computed.pop(key))
    assert not computed


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_every_tensor_is_read_as_transformers_loads_it(name, dtype, homes):
    source = ModelSource(str(homes(name)), dtype=dtype)
    built = meta_model.build(source)
    checkpoint = Checkpoint(built.files, built.model)
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    for key, tensor in type(built.model).from_pretrained(homes(name), dtype=dtype).state_dict().items():
        if not checkpoint.missing([key]):
            assert torch.equal(checkpoint.read([key])[key], tensor), key
        else:
            assert key in built.model.all_tied_weights_keys


REFUSED = {
    "training": ([{"technique": "gmp"}], r"step 1 \(gmp\) trains"),
    "a ranking over all blocks": ([], r"step 1 \(onlooker\) compares all blocks"),
    "a new architecture": ([{"technique": "upcycle"}], r"step 1 \(upcycle\) changes the architecture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_the_whole_model_is_refused(case, homes, tmp_path):
    steps, reason = REFUSED[case]
    steps = [Onlooker(whole=True)] if "onlooker" in reason else steps
    recipe = recipe_of(steps, "streamed")
    with pytest.raises(RecipeError, match=f"(?s)use driver: blockwise.*{reason}"):
        compress(Job(ModelSource(str(homes("llama"))), recipe, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_cannot_be_streamed(homes):
    recipe = {"steps": list(RTN), "driver": "streamed"}
    with pytest.raises(RecipeError, match="hf-optim compress"):
        hf_optim.optimize(tiny_llama(), recipe)
    with pytest.raises(RecipeError, match="hf-optim compress"):
        AutoModelForCausalLM.from_pretrained(homes("llama"), optim_config=recipe)


def test_only_streamed_spills():
    with pytest.raises(RecipeError, match="remove spill, or use driver: streamed"):
        hf_optim.OptimConfig.parse({"steps": list(RTN), "driver": "blockwise", "spill": "here"})


def test_the_record_has_the_metrics_and_no_directory_of_this_machine(homes, tmp_path):
    streamed(homes("llama"), GPTQ, random_batches(tiny_llama()), tmp_path / "out", spill=str(tmp_path))
    record = Record.read(tmp_path / "out")
    stage = record.stages[0]
    assert stage["driver"] == "streamed"
    assert stage["blocks"] == 2
    assert stage["calibration_tokens"] == 3 * 2 * 7
    assert stage["tokens_per_second"] == pytest.approx(42 / stage["seconds_per_block"], rel=0.01)
    assert stage["floor"]["flops_per_block"] > 0
    assert "spill" not in record.recipe


def test_the_line_shows_block_and_step(homes, tmp_path, monkeypatch):
    model = homes("llama")
    with bars_allowed(monkeypatch), terminal() as seen:
        streamed(model, GPTQ, random_batches(tiny_llama()), tmp_path / "out")
    assert "calibrating: 1/2 blocks" in seen.written
    assert "model.layers.1: gptq" in seen.written
    assert "model shards" not in seen.written


def live_bytes():
    """Return the bytes of all live tensors with data."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        # Checked by type only, since reading __class__ of some proxies runs code. Fake tensors have no data.
        plain = issubclass(type(found), torch.Tensor) and not issubclass(type(found), FakeTensor)
        if plain and found.device.type == "cpu":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize(("build", "inner"), [(tiny_llama, 512), (tiny_mixtral, 128)], ids=["llama", "mixtral"])
def test_at_most_three_blocks_are_in_memory(build, inner, tmp_path):
    """Of twelve: the current one, the prefetched one, and the one before until it is offloaded."""
    shape = {"hidden_size": 128, "intermediate_size": inner, "num_hidden_layers": 12, "vocab_size": 64}
    build(**shape).save_pretrained(tmp_path / "model", max_shard_size="2MB")
    before, peaks = live_bytes(), []

    class Gauge(Onlooker):
        @hookimpl
        def calibrate(self, run, scope):
            peaks.append(live_bytes() - before)
            yield
            run.cover(self, scope.linears)

    streamed(tmp_path / "model", [Gauge()], random_batches(tiny_llama()), tmp_path / "out")
    block = sum(t.nbytes for name, t in tensors_of(tmp_path / "out").items() if name.startswith("model.layers.0."))
    assert len(peaks) == 12
    assert block <= max(peaks) < 3 * block
