"""Plans of offloading: what fits where, evenly, and the least budget in every refusal."""

from __future__ import annotations

import pytest

from hf_optim import ModelError, RecipeError
from hf_optim.toolkit.offloading import make_plan, parse_size

SETTINGS = {
    "to": "cpu", "ahead": 1, "device_budget": None, "host_budget": None, "readers": 0, "host_is_device": False,
}  # fmt: skip


def plan(sizes, outside=50, **changes):
    return make_plan(sizes, outside, 0, **SETTINGS | changes)


def places(found):
    return "".join(place[0] if place != "disk" else "-" for place in found.places)  # device, host, disk


def test_without_a_budget_nothing_stays():
    found = plan([10] * 6)
    assert places(found) == "hhhhhh"
    assert found.ring == 20
    assert found.device_bytes == 70
    assert found.streamed_bytes == 60


@pytest.mark.parametrize(
    ("budget", "expected"), [(70, "hhhhhhhh"), (80, "hhhhdhhh"), (99, "hhdhhhdh"), (130, "dddddddd")]
)
def test_resident_blocks_lie_evenly_and_within_the_budget(budget, expected):
    found = plan([10] * 8, device_budget=budget)
    assert places(found) == expected
    assert found.device_bytes <= budget


def test_no_two_resident_blocks_are_neighbours_up_to_half():
    for count in range(1, 17):
        found = plan([10] * 32, device_budget=70 + 10 * count)
        assert places(found).count("d") == count
        assert "dd" not in places(found)


def test_blocks_of_different_sizes_share_a_ring_of_the_largest():
    found = plan([10, 30, 10, 20, 10], device_budget=122)
    assert found.device_bytes <= 122
    assert found.ring == 2 * max(found.sizes[i] for i in found.streamed)


def test_host_budget_keeps_blocks_from_the_disk():
    found = plan([10] * 6, to="disk", host_budget=35, readers=5)
    assert places(found).count("h") == 3
    assert places(found).count("-") == 3
    assert found.host_bytes == 35
    assert "hh" not in places(found)


def test_on_a_cpu_the_budget_of_the_host_is_that_of_all_weights():
    found = plan([10] * 6, to="disk", host_budget=92, readers=5, host_is_device=True)
    assert places(found) == "---d--"
    assert found.device_bytes + found.readers <= 92


def test_refusals_name_the_least():
    with pytest.raises(ModelError, match=r"device_memory=60 bytes is too little: .*the least is 70 bytes"):
        plan([10] * 6, device_budget=60)
    with pytest.raises(ModelError, match=r"host_memory=60 bytes is too little: .*the least is 75 bytes"):
        plan([10] * 6, to="disk", host_budget=60, readers=5, host_is_device=True)
    with pytest.raises(ModelError, match=r"host_memory=30 bytes is less than the 60 bytes .* offload to disk"):
        plan([10] * 6, host_budget=30)
    with pytest.raises(ModelError, match=r"host_memory=3 bytes is too little: the readers take 5 bytes"):
        plan([10] * 6, to="disk", host_budget=3, readers=5)


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("500 MB", 500_000_000), ("1.5kib", 1536), (7, 7), (None, None), ("12", 12)]
)
def test_sizes(text, size):
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["4GX", "", "-1", -1, True, "1e9", "lots"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(RecipeError, match=r"device_memory: .* is (not a size|less than nothing)"):
        parse_size(text, "device_memory")


def test_time_is_that_of_the_slower_link():
    import dataclasses

    found = dataclasses.replace(plan([10] * 6, to="disk", host_budget=35, readers=5), link=60.0, disk=10.0)
    assert found.seconds == pytest.approx(3.0)
    assert dataclasses.replace(found, disk=300.0).seconds == pytest.approx(1.0)
