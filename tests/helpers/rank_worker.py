"""Run by ``test_distributed`` as one of two ranks: what each observer finds is what one rank finds on all the data."""

from __future__ import annotations

import sys

import torch
from torch import nn

from hf_optim.errors import NumericalError, RankError
from hf_optim.runs import distributed
from hf_optim.toolkit.distributed import collectives, divided
from hf_optim.toolkit.quantization import Grid, GridSpec
from hf_optim.toolkit.statistics.observers import ChannelAbsMax, InputObserver, TensorMinMax
from hf_optim.toolkit.statistics.second_moment import SecondMoment

LAYERS = {name: nn.Linear(6, 2) for name in ("q", "k", "late")}


def feed(batches) -> None:
    for number, batch in batches:
        LAYERS["q"](batch)
        LAYERS["k"](batch if number % 2 else batch + 1.0)  # reads with q on odd batches only: rank 1's
        if number == 3:
            LAYERS["late"](batch)  # never on rank 0


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


class Odd(Exception):
    """An exception that cannot be sent: its arguments are not its message."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raising(error: Exception):
    def piece():
        raise error

    return piece


def check_divided_work() -> None:
    grid = Grid(GridSpec(bits=4, strategy="channel"), torch.rand(3, 1, dtype=torch.float64))

    def piece(number: int):
        values = torch.full((2, 3), number, dtype=torch.float32)
        made = {"rank": collectives.rank(), "half": values.half().t(), "eighth": values.to(torch.float8_e4m3fn)}
        return number, made, [grid, torch.tensor(number, dtype=torch.int8), torch.zeros(0, 4)]

    costs = [1.0, 5.0, 2.0]
    found = list(divided([lambda number=number: piece(number) for number in range(3)], costs))
    assert [made["rank"] for _, made, _ in found] == [1, 0, 1]
    for number, (own, made, (sent, small, empty)) in enumerate(found):
        assert (own, int(small), small.dtype, tuple(empty.shape)) == (number, number, torch.int8, (0, 4))
        assert (tuple(made["half"].shape), float(made["half"].sum())) == ((3, 2), 6 * number)
        eighth = made["eighth"]
        assert (eighth.dtype, float(eighth.float().sum())) == (torch.float8_e4m3fn, 6 * number)
        assert sent.spec == grid.spec
        mine = sent.scale.clone()
        assert torch.equal(collectives.all_reduce_(mine, "max"), sent.scale)
    for error, kind in ((NumericalError("not finite"), NumericalError), (Odd(1, 2), RankError)):
        results = divided([lambda: 7, raising(error)], [1.0, 9.0])
        assert next(results) == 7
        try:
            next(results)
        except kind as raised:
            assert str(error) in str(raised)  # noqa: PT017
        else:
            raise AssertionError("no error")


def check_observers() -> None:
    everything = list(enumerate(torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))))
    for kind in (ChannelAbsMax, TensorMinMax, SecondMoment):
        with kind(LAYERS) as found:
            feed(everything[collectives.rank() :: 2])
        whole = kind(LAYERS)
        for number, batch in everything:
            whole.update("q", batch)
            whole.update("k", batch if number % 2 else batch + 1.0)
            if number == 3:
                whole.update("late", batch)
        whole.release()
        whole.complete()
        if kind is SecondMoment:
            assert {name: moment.count for name, moment in found.items()} == {"q": 12, "k": 12, "late": 3}
            same({n: m.total for n, m in found.items()}, {n: m.total for n, m in whole.found.items()})
        else:
            same(found, whole.found)


def check_codes() -> None:
    """Codes of GPTQ on a badly conditioned Hessian: those of one rank, if sums are in float64 and are rounded once."""
    from hf_optim.toolkit.quantization import GridSpec, make_grid
    from hf_optim_plugins.quantization.gptq import quantize_columns

    generator = torch.Generator().manual_seed(0)
    batches = 1.0 + 0.01 * torch.randn(16, 32, 96, generator=generator)
    layer = nn.Linear(96, 64, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    grid = make_grid(layer.weight.detach(), GridSpec(4, strategy="group", group_size=32))
    for dtype in (torch.float32, torch.float64):
        with SecondMoment({"layer": layer}, dtype=dtype) as found:
            for batch in batches[collectives.rank() :: 2]:
                layer(batch)
        whole = SecondMoment({"layer": layer}, dtype=dtype)
        for batch in batches:
            whole.update("layer", batch)
        whole.release()
        whole.complete()
        mine, all_of_it = (sums["layer"].total.float() for sums in (found, whole.found))
        codes = [quantize_columns(layer.weight, hessian, grid) for hessian in (mine, all_of_it)]
        equal = float((codes[0] == codes[1]).double().mean())
        assert torch.equal(mine, all_of_it) is (dtype == torch.float64)
        assert equal == 1.0 if dtype == torch.float64 else equal > 0.9, equal


def check_union() -> None:
    mine = [[(3, 1), (2,)], [(2,), (4, 4, 4), (0,)]][collectives.rank()]
    assert collectives.union_over_ranks(mine) == [(3, 1), (2,), (4, 4, 4), (0,)]
    assert collectives.union_over_ranks([]) == []
    assert collectives.sum_over_ranks(collectives.rank() + 1) == 3
    assert not collectives.is_true_on_all_ranks(distributed.is_main())


def check_refusals() -> None:
    class Own(InputObserver[int]):
        def update(self, name, inputs):
            self.found[name] = 1

    try:
        with Own(LAYERS):
            feed([(0, torch.ones(1, 6))])
    except NotImplementedError as error:
        assert "Own" in str(error)  # noqa: PT017
    else:
        raise AssertionError("an observer that cannot be reduced was accepted")
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 1.0)
    distributed.require_equal_weights(model)
    nn.init.constant_(model.weight, 1.0 + collectives.rank())
    try:
        distributed.require_equal_weights(model)
    except NumericalError as error:
        assert "weight" in str(error)  # noqa: PT017
    else:
        raise AssertionError("ranks with other weights agreed")


def main() -> int:
    with distributed.joined(), torch.no_grad():
        assert collectives.world_size() == 2
        if "fail" in sys.argv:
            if not distributed.is_main():
                raise ValueError("this rank fails")
            distributed.barrier()  # the other one waits, and is ended
        check_divided_work()
        check_observers()
        check_codes()
        check_union()
        check_refusals()
        print("checked")
    assert collectives.world_size() == 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
