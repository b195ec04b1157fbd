"""Padding removal: an encoder computes the valid tokens of a batch, and not its padding.

    p(b, t) = number of valid tokens before (b, t)        a prefix sum of the mask; rows of equal length are neighbours
    x[p(b, t)] = input[b, t]  for valid (b, t)            [B, T] becomes one row [1, total]
    every linear layer, norm and activation:              on total tokens instead of B * T
    attention:                                            within each document, its own tokens alone
    output[b, t] = y[p(b, t)],  0 where there is padding

"Effective Transformer", ByteDance (github.com/bytedance/effective_transformer, 2020); also in Zhai et al.,
"ByteTransformer", arXiv 2210.03052 (2022). The authors' code removes padding around the linear layers of BERT and puts
it back around each attention, which it computes on the padded batch. Here attention has no padding either: on a CPU,
documents of equal length are computed together; on CUDA, in half precision, by torch's variable-length flash attention.
Only where scores have a position bias (T5, MPNet), or single precision meets a window, does CUDA pad around the
product, as the authors do.

Valid tokens get the outputs of stock transformers at the positions that stock transformers gives them: their column
(BERT), or their number (RoBERTa, MPNet), whatever side the padding is on. What stock transformers computes at padding
depends on the padding and means nothing; it is zero here, and so are rows without any token. A pooler reads the first
valid token of a row: with padding on the left, stock transformers reads padding there.

In training, gradients are equal; dropout draws other numbers, since it draws fewer. Reading the mask waits for the
device once a batch. The setting is an entry of ``config.json``, which stock transformers ignores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_optim import Card, Contract, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit import packing


@technique(
    "padding_removal",
    family="runtime",
    paper=Paper(
        "2210.03052", "ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs", 2022
    ),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.TIED_BLOCKS},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.STOCK_DENSE,
)
class PaddingRemoval(Technique):
    """Compute the valid tokens of a padded batch alone; the weights are unchanged.

    Attributes:
        largest_share: batches of which more than this share is valid tokens run with their padding, as in stock
            transformers: there is little to save, and packing costs something.
        capture: on a GPU, in half precision and without gradients, run forwards whose sizes come again as CUDA graphs:
            without padding, the launches of an encoder take longer than its work. Each size costs memory.
    """

    largest_share: float = option(0.95, above=0.0, high=1.0)
    capture: bool = True

    @classmethod
    def for_testing(cls) -> PaddingRemoval:
        return cls(largest_share=1.0)

    def needs_data(self) -> bool:
        return False

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        packing.find_encoder(model, label)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        model = run.model
        name = packing.attach_packing(model, self.largest_share, run.label(self), self.capture)
        packing.store_setting(model.config, self.largest_share, self.capture)
        run.report(self, encoder=name or type(model).__name__, largest_share=self.largest_share)

    def recompute(self, case: Any) -> dict[str, Any]:
        encoder, _ = packing.find_encoder(case.after, "recompute")
        name = next(name for name, module in case.after.named_modules() if module is encoder)
        setting = packing.stored_setting(case.after.config) or {}
        return {"encoder": name or type(case.after).__name__, "largest_share": setting.get("largest_share")}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if not figures:
            return
        stock = card.when(
            " Stock transformers ignores the entry and computes the padding.",
            reload=[Reload.STOCK_DENSE, Reload.STOCK_FORMAT, Reload.STOCK_ARCH],
        )
        card.paragraph(
            "Padding removal",
            f"The encoder (`{figures['encoder']}`) computes the valid tokens of a batch without its padding, where at "
            f"most {figures['largest_share']:.0%} of the batch is valid. An entry of `config.json` says so, which "
            f'`optim_config="auto"` reads. Hidden states at padding are zero.{stock}',
        )


@hookimpl
def register_techniques(register) -> None:
    register(PaddingRemoval)
