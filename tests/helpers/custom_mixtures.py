"""Mixtures of experts as people write them: ``a`` routes, ``b`` are the experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))


class Mixture(nn.Module):
    """Four experts; ``factors`` returns the weight of each for each token ``[B, T, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a: nn.Module = nn.Linear(32, 4)
        self.b = nn.ModuleList(mlp() for _ in range(4))

    def factors(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        factors = self.factors(hidden)
        return sum(factors[..., n : n + 1] * expert(hidden) for n, expert in enumerate(self.b))


def spread(values: Tensor, indices: Tensor, count: int = 4) -> Tensor:
    return torch.zeros(*values.shape[:-1], count).to(values).scatter(-1, indices, values)


class ExpertChoice(Mixture):
    """Each expert chooses its tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, 32)
        values, chosen = self.a(rows).softmax(-1).t().topk(3, dim=-1)
        result = torch.zeros_like(rows)
        for n, expert in enumerate(self.b):
            result = result.index_add(0, chosen[n], values[n][:, None] * expert(rows[chosen[n]]))
        return result.view_as(hidden)


class Threshold(Mixture):
    """Every expert whose score is above one half."""

    def factors(self, hidden: Tensor) -> Tensor:
        scores = self.a(hidden).sigmoid()
        return scores * (scores > 0.5)


class Hard(Mixture):
    """The best expert, unweighted; experts run on the rows that chose them."""

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, 32)
        best, result = self.a(rows).argmax(-1), torch.zeros_like(rows)
        for n, expert in enumerate(self.b):
            chosen = torch.where(best == n)[0]
            result[chosen] = expert(rows[chosen])
        return result.view_as(hidden)


class TwoLayers(Mixture):
    """A router of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))

    def factors(self, hidden: Tensor) -> Tensor:
        values, indices = self.a(hidden).topk(2, -1)
        return spread(values.softmax(-1), indices)


class TopP(Mixture):
    """As many experts as reach a share of the probability."""

    def factors(self, hidden: Tensor) -> Tensor:
        values, indices = self.a(hidden).softmax(-1).sort(-1, descending=True)
        return spread(values * (values.cumsum(-1) - values < 0.7), indices)


class Depth(Mixture):
    """A mixture of depths: three tokens pass the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 1), mlp()

    def forward(self, hidden: Tensor) -> Tensor:
        values, chosen = self.a(hidden).squeeze(-1).topk(3, dim=-1)
        index = chosen[..., None].expand(-1, -1, 32)
        return torch.zeros_like(hidden).scatter(1, index, self.b(hidden.gather(1, index)) * values.sigmoid()[..., None])


class Stacked(Mixture):
    """All experts, as stacked matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 6), None
        self.up, self.down = nn.Parameter(torch.randn(6, 32, 20)), nn.Parameter(torch.randn(6, 20, 32))

    def forward(self, hidden: Tensor) -> Tensor:
        inner = torch.einsum("bth,ehf->btef", hidden, self.up).relu()
        outputs = torch.einsum("btef,efh->bteh", inner, self.down)
        return torch.einsum("bteh,bte->bth", outputs, self.a(hidden).softmax(-1))


class Slots(Mixture):
    """A soft mixture: each expert reads two weighted sums of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        scores = self.a(hidden)
        slots = torch.einsum("bth,bts->bsh", hidden, scores.softmax(1))
        outputs = torch.cat([expert(slots[:, 2 * n : 2 * n + 2]) for n, expert in enumerate(self.b)], 1)
        return torch.einsum("bsh,bts->bth", outputs, scores.softmax(2))


class StraightThrough(Mixture):
    """The best expert, with the gradient of all."""

    def factors(self, hidden: Tensor) -> Tensor:
        scores = self.a(hidden)
        hard, soft = one_hot(scores.argmax(-1), 4).to(hidden), scores.softmax(-1)
        return hard - soft.detach() + soft


class Cosine(Mixture):
    """Experts have keys, which a projection of the token is compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.keys = nn.Linear(32, 16), nn.Parameter(torch.randn(4, 16))

    def factors(self, hidden: Tensor) -> Tensor:
        values, indices = (normalize(self.a(hidden), dim=-1) @ normalize(self.keys, dim=-1).t()).topk(2, -1)
        return spread(values.softmax(-1), indices)


ROUTING: dict[type[Mixture], set[str]] = {
    ExpertChoice: {".a"}, Threshold: {".a"}, Hard: {".a"}, TwoLayers: {".a.0", ".a.2"}, TopP: {".a"}, Depth: {".a"},
    Stacked: {".a"}, Slots: {".a"}, StraightThrough: {".a"}, Cosine: {".a", ""},
}  # fmt: skip
"""Mixture -> what routes in it, relative to its name; an empty name for a bare parameter of the mixture."""
