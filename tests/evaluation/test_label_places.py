"""Labels of plots stand near their points, within the frame, and over no other label."""

from __future__ import annotations

import itertools
import random

import pytest

from hf_optim.evaluation.cards.label_places import edge_towards, needs_line, place_labels

FRAME = (0.0, 0.0, 700.0, 400.0)


def overlap(one, size, two, other):
    return abs(one[0] - two[0]) < (size[0] + other[0]) / 2 and abs(one[1] - two[1]) < (size[1] + other[1]) / 2


@pytest.mark.parametrize("kind", ["one place", "a column", "scattered", "five hundred"])
def test_labels_cover_no_other_label(kind):
    random.seed(3)
    points = {
        "one place": [(350.0, 200.0)] * 7,
        "a column": [(600.0, 20.0 + 9 * i) for i in range(30)],
        "scattered": [(random.uniform(0, 700), random.uniform(0, 400)) for _ in range(40)],
        "five hundred": [(random.uniform(0, 700), random.uniform(0, 400)) for _ in range(500)],
    }[kind]
    sizes = [(20.0, 15.0)] * len(points)
    found = place_labels(points, sizes, FRAME, 5.0, [sorted(points[:5])])
    placed = [centre for centre in found if centre is not None]
    assert len(found) == len(points)
    assert len(placed) == len(points) or (kind == "five hundred" and len(placed) > 200)
    for one, two in itertools.combinations(placed, 2):
        assert not overlap(one, (20, 15), two, (20, 15))
    for x, y in placed:
        assert 10 <= x <= 690
        assert 7.5 <= y <= 392.5


def test_a_label_avoids_points_and_lines_if_it_can():
    line = [(0.0, 110.0), (700.0, 110.0)]
    (centre, _) = place_labels([(300.0, 100.0), (325.0, 100.0)], [(20.0, 15.0)] * 2, FRAME, 5.0, [line])
    assert not overlap(centre, (20, 15), (325, 100), (10, 10))
    assert abs(centre[1] - 110) > 7.5


def test_a_label_without_room_is_left_out():
    assert place_labels([(5.0, 5.0)], [(20.0, 15.0)], (0.0, 0.0, 10.0, 10.0), 2.0) == [None]
    assert place_labels([], [], FRAME, 5.0) == []


def test_a_line_leads_to_a_label_that_is_distant_or_nearer_to_another_point():
    point, size = (100.0, 100.0), (20.0, 10.0)
    assert not needs_line(point, (118.0, 100.0), size, 5.0, [point])
    assert needs_line(point, (160.0, 100.0), size, 5.0, [point])
    assert needs_line(point, (118.0, 100.0), size, 5.0, [point, (118.0, 112.0)])
    assert edge_towards(point, (160.0, 100.0), size) == (150.0, 100.0)
    assert edge_towards(point, point, size) == point
