"""GOBO: its codes on random weights, what is stored, pruned models, and a real encoder."""

from __future__ import annotations

import copy
import json
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import hf_optim
from hf_optim import Kernel, ModelError
from hf_optim.checkpoints.dense import convert_to_dense
from hf_optim.compressed.packed.packed_linear import KernelWarning
from hf_optim.evaluation import evaluate
from hf_optim.recipes.config import DataConfig
from hf_optim.recipes.traits import FLOAT_WEIGHTS, QUANTIZED, SPARSE, SPARSE_NM
from hf_optim.runs.run import run_of
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.quantization.codebooks import fit_codebook, nearest_centroids, outlier_mask
from hf_optim.toolkit.quantization.grids import GridSpec, make_grid
from hf_optim_plugins.quantization import _gobo_modules
from hf_optim_plugins.quantization._gobo_modules import GoboEmbedding, GoboLinear, pack_codes, unpack_codes

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def gobo(model, *before, **fields):
    return hf_optim.optimize(model, {"steps": [*before, {"technique": "gobo", **fields}]})


def coded(model):
    return {name: module for name, module in model.named_modules() if getattr(module, "holds_codes", False)}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


# -- the layers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(3, 1), (4, 17), (2, 64)])
def test_packed_codes_have_no_gaps_and_unpack_exactly(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert packed.shape == (shape[0], -(-shape[1] // 8) * bits)
    number = sum(int(byte) << 8 * i for i, byte in enumerate(packed[-1]))
    assert [(number >> bits * k) & (2**bits - 1) for k in range(shape[1])] == codes[-1].tolist()
    assert torch.equal(unpack_codes(packed, bits, shape[1]).to(torch.uint8), codes)


def layer_of(shape, bits, bias=True, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    outlying = torch.rand(shape, generator=generator) < 0.1
    centroids = torch.randn(2**bits, generator=generator).sort().values.to(dtype)
    codes = nearest_centroids(weight, centroids)
    own = nn.Parameter(torch.randn(shape[0], generator=generator).to(dtype)) if bias else None
    made = GoboLinear(shape, bits, int(outlying.sum()), own, False, dtype)
    made.fill(weight, codes, centroids, outlying)
    return made, torch.where(outlying, weight, centroids[codes.long()])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(7, 33), (16, 64), (1, 5)])
def test_a_layer_decodes_to_its_centroids_and_outliers(bits, shape):
    made, weight = layer_of(shape, bits, seed=bits)
    assert torch.equal(made.decode(), weight)
    assert torch.equal(made.decode(shape[0] // 2), weight[shape[0] // 2 :])
    x = torch.randn(2, 3, shape[1])
    assert torch.equal(made(x), nn.functional.linear(x, weight, made.bias))
    stock, exact = made.to_dense()
    assert exact
    assert type(stock) is nn.Linear
    assert torch.equal(stock(x), made(x))


def test_a_large_layer_is_decoded_in_parts(monkeypatch):
    made, weight = layer_of((10, 24), 3)
    x = torch.randn(4, 24)
    monkeypatch.setattr(_gobo_modules, "MOST_DECODED", 3 * 24)
    assert torch.allclose(made(x), nn.functional.linear(x, weight, made.bias), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_an_embedding_decodes_only_the_rows_it_looks_up(bits):
    linear, table = layer_of((20, 33), bits)
    made = GoboEmbedding((20, 33), bits, len(linear.outliers), int(linear.outlier_counts.max()), 0, torch.float32)
    made.load_state_dict({k: v for k, v in linear.state_dict().items() if k != "bias"})
    ids = torch.tensor([[3, 3, 19], [0, 7, 12]])
    assert torch.equal(made(ids), table[ids])
    stock, exact = made.to_dense()
    assert exact
    assert torch.equal(stock(ids), table[ids])
    assert stock.padding_idx == 0


# -- the technique ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("build", "bits"), [(tiny_llama, 3), (tiny_gpt2, 2), (tiny_bert, 5)])
def test_every_layer_holds_what_the_paper_says(build, bits):
    dense, model = build(), gobo(build(), bits=bits, threshold=-2.0)
    layers = coded(model)
    assert layers
    for name, made in layers.items():
        stock = dense.get_submodule(name)
        weight = stock.weight.T if isinstance(stock, Conv1D) else stock.weight
        outlying = outlier_mask(weight, -2.0)
        centroids = fit_codebook(weight[~outlying], 2**bits).centroids.float()
        wanted = torch.where(outlying, weight, centroids[nearest_centroids(weight, centroids).long()])
        assert torch.equal(made.decode(), wanted)
        assert len(made.outliers) <= int(outlying.sum())
        assert made.packed.numel() == made.shape[0] * -(-made.shape[1] // 8) * bits
    assert model.config.gobo["modules"].keys() == layers.keys()
    assert type(model).__name__.startswith("Gobo")


def test_the_record_and_the_card_have_the_size(tmp_path):
    model = gobo(tiny_llama(), bits=3)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "hf_optim.json").read_text())
    figures = record["steps"]["0"]
    held = sum(b.numel() * b.element_size() for made in coded(model).values() for b in made.buffers())
    assert figures["bytes"] == held
    assert figures["bytes_before"] == 4 * sum(made.shape[0] * made.shape[1] for made in coded(model).values())
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() * t.element_size() for k, t in stored.items() if k.rpartition(".")[2] in
               ("packed", "centroids", "outliers", "outlier_counts", "outlier_columns")) == held  # fmt: skip
    card = (tmp_path / "README.md").read_text()
    assert f"{figures['bits_per_weight']:.2f} bits per weight" in card
    assert "outliers %" in card
    [coverage] = record["coverage"].values()
    assert coverage["weights_touched"] == figures["bytes_before"] // 4


def test_bits_that_a_step_assigned_are_followed(monkeypatch):
    from hf_optim.runs.run import Run

    plan = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 4, "model.layers.0.mlp.down_proj": 16}
    monkeypatch.setattr(Run, "bits_of", lambda self, name, default: plan.get(name, default))
    model = gobo(tiny_llama())
    layers = coded(model)
    assert layers["model.layers.0.mlp.up_proj"].bits == 2
    assert layers["model.layers.1.mlp.up_proj"].bits == 4
    assert layers["model.layers.0.self_attn.q_proj"].bits == 3
    assert "model.layers.0.mlp.down_proj" not in layers
    [coverage] = run_of(model).record.coverage.values()
    assert coverage["skipped"] == {
        "16 bits are assigned to it": ["model.layers.0.mlp.down_proj"],
        "output head": ["lm_head"],
    }


def test_embeddings_are_an_option_and_a_shared_table_is_left_out():
    model = gobo(tiny_bert(), embedding_bits=4)
    table = model.get_input_embeddings()
    assert type(table).__name__ == "GoboEmbedding"
    assert table.bits == 4
    tied = gobo(tiny_gpt2(), embedding_bits=4)
    assert type(tied.get_input_embeddings()) is nn.Embedding
    [coverage] = run_of(tied).record.coverage.values()
    assert any("tied" in reason for reason in coverage["skipped"])


def test_stacked_experts_are_listed_as_skipped():
    [coverage] = run_of(gobo(tiny_mixtral())).record.coverage.values()
    assert any("stacked" in reason for reason in coverage["skipped"])


def test_weights_without_a_gaussian_are_skipped_with_the_reason():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e5)
    made = gobo(model)
    assert "model.layers.0.mlp.up_proj" not in coded(made)
    [coverage] = run_of(made).record.coverage.values()
    assert any("outliers" in reason for reason in coverage["skipped"])
    with pytest.raises(ModelError, match="has no layer to change"):
        gobo(tiny_llama(), threshold=50.0)


@pytest.mark.parametrize(("step", "trait"), [("magnitude", SPARSE), ("nm", SPARSE_NM)])
def test_pruned_weights_stay_zero(step, trait, tmp_path):
    model = gobo(tiny_llama(), {"technique": step})
    run = run_of(model)
    assert {trait, QUANTIZED} <= run.traits
    assert FLOAT_WEIGHTS not in run.traits
    assert all(holds(t, run) for t in run.traits)
    for name, mask in run.masks.items():
        weight = model.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert float((weight[mask] != 0).float().mean()) > 0.5
    model.save_pretrained(tmp_path)


# -- checkpoints ------------------------------------------------------------------------------------------------------
def test_stock_transformers_reads_it_into_packed_layers(tmp_path, stock_python):
    model = gobo(tiny_bert(), embedding_bits=3).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    torch.save(logits(model), tmp_path / "logits")
    code = f"""
        import torch
        from transformers import AutoModelForSequenceClassification as Auto, AutoModel
        try:
            Auto.from_pretrained(r"{tmp_path / "out"}")
        except (ValueError, OSError) as error:
            assert "trust_remote_code" in str(error)
        else:
            raise AssertionError("it was loaded without its code")
        model = Auto.from_pretrained(r"{tmp_path / "out"}", trust_remote_code=True, dtype="auto")
        ids = torch.tensor({IDS.tolist()})
        assert torch.equal(model(ids)[0].detach(), torch.load(r"{tmp_path / "logits"}"))
        held = [m for m in model.modules() if getattr(m, "holds_codes", False)]
        assert held and all(m.packed.dtype == torch.uint8 and m.centroids.dtype == torch.bfloat16 for m in held)
        headless = AutoModel.from_pretrained(r"{tmp_path / "out"}", trust_remote_code=True, dtype="auto")
        assert sum(getattr(m, "holds_codes", False) for m in headless.modules()) == len(held)
        assert torch.equal(headless(ids)[0], model.bert(ids)[0])
        """
    done = stock_python.copy(textwrap.dedent(code))
    assert done.status == 0, done.err


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_a_dense_export_is_the_stock_model_of_the_same_outputs(build):
    model = gobo(build(), embedding_bits=3)
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if build is tiny_t5 else {})}
    with torch.no_grad():
        expected = model(**inputs).logits
    assert convert_to_dense(model) == []
    assert type(model) is type(build())
    assert not coded(model)
    assert not hasattr(model.config, "gobo")
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-6)


# -- kernels ----------------------------------------------------------------------------------------------------------
class PackedWeight(nn.Module):
    """Computes like the layer, with one code per byte."""

    label = "in bytes"

    def __init__(self, module):
        super().__init__()
        self.register_buffer("held", module.codes(), persistent=False)
        self.register_buffer("dense", module.decode(), persistent=False)
        self.register_buffer("bias", None if module.bias is None else module.bias.detach(), persistent=False)

    def accepts(self, x):
        return x.dtype == self.dense.dtype

    def forward(self, x):
        return nn.functional.linear(x, self.dense, self.bias) * 1.0

    def codes(self):
        return self.held

    def renew(self):
        pass


BYTES = Kernel(
    "bytes", supports=lambda m: None if getattr(m, "holds_codes", False) else "", prepack=PackedWeight, codebook=True
)


@pytest.mark.filterwarnings("error")
def test_codebook_layers_switch_to_a_kernel_and_back(tmp_path):
    model = gobo(tiny_bert())
    expected, before = logits(model), copy.deepcopy(model.state_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    hf_optim.accelerate(model, [BYTES])
    rows = {row.name: row for row in hf_optim.report(model) if row.kernel}
    assert rows.keys() == coded(model).keys()
    assert all("packed" not in module._buffers for module in coded(model).values())
    assert torch.equal(logits(model), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    twin = copy.deepcopy(model).half()
    assert all(module.packed_weight.dense.dtype == torch.float16 for module in coded(twin).values())
    model.save_pretrained(tmp_path)
    hf_optim.restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.state_dict()) == list(before)
    assert torch.equal(logits(model), expected)


def test_a_failing_kernel_leaves_the_layer_correct(monkeypatch):
    model = gobo(tiny_bert())
    expected = logits(model)
    hf_optim.accelerate(model, [BYTES])

    def broken(self, x):
        raise RuntimeError("no memory")

    monkeypatch.setattr(PackedWeight, "forward", broken)
    with pytest.warns(KernelWarning, match="no memory"):
        assert torch.equal(logits(model), expected)
    assert not [row for row in hf_optim.report(model) if row.kernel]


def test_on_a_cpu_the_layers_stay_and_the_reason_is_given():
    model = gobo(tiny_bert())
    with pytest.warns(KernelWarning, match="no kernel for cpu"):
        hf_optim.accelerate(model)
    assert all("cpu" in row.reason for row in hf_optim.report(model) if row.name in coded(model))


# -- a real encoder ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def encoder(minilm):
    return AutoModel.from_pretrained(minilm).eval()


@pytest.mark.real_model
def test_of_a_real_model_few_weights_are_outliers_and_three_bits_are_nearer_than_rounding(encoder):
    dense = {n: m.weight.detach() for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and "encoder" in n}
    model = gobo(copy.deepcopy(encoder), bits=3, embedding_bits=3)
    figures = run_of(model).record.steps["0"]
    assert 0.001 <= figures["outlier_share"] <= 0.003
    assert figures["bits_per_weight"] < 3.2
    for name, weight in dense.items():
        grid = make_grid(weight, GridSpec(3, "int", "channel", None, True), "minmax")
        rounded = (grid.quantize(weight).float() - weight / grid.scale) * grid.scale
        ours = coded(model)[name].decode() - weight
        assert ours.abs().sum() < rounded.abs().sum()
        assert ours.norm() < rounded.norm()


@pytest.mark.real_model
@pytest.mark.parametrize(("bits", "least"), [(3, 0.820), (2, 0.80)])
def test_sentence_vectors_survive_where_rounding_breaks_them(encoder, minilm, shared_data, bits, least):
    # Dense: 0.8203; rounded per channel: 0.7895 and 0.2945.
    data = DataConfig(str(shared_data / "stsb/test.tsv"), samples=None)
    model = gobo(copy.deepcopy(encoder), bits=bits)
    convert_to_dense(model)  # the same weights, decoded once
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    found = evaluate.evaluate(model, tokenizer, data, speed=False)
    assert found["pairs"] == 1379
    assert found["spearman"] >= least
