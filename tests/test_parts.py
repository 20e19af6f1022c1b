# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which part of a table each of several processes holds, for devices that are not here."""

import types
from typing import NamedTuple

import numpy as np
import pytest

from jtok_jax.errors import ConfigError
from jtok_jax.store import part as part_module
from jtok_jax.store.part import Part

ROW = 2, 4, 6  # layers, experts, columns


class Device(NamedTuple):
    process_index: int
    number: int


def part_of(monkeypatch, process: int, indices: dict[int, list[tuple[slice, slice]]]) -> Part:
    """The part of `process`, whose devices have each these (experts, columns)."""
    devices = {
        Device(owner, number): (
            slice(None), slice(None), *index,
        )
        for owner, of in indices.items()
        for number, index in enumerate(of)
    }  # fmt: skip
    sharding = types.SimpleNamespace(
        is_fully_addressable=False, devices_indices_map=lambda shape: devices
    )
    monkeypatch.setattr(part_module.jax, "process_index", lambda: process)
    return Part(ROW, sharding)


ALL = slice(None)
APART = {  # two columns a device, those of a process not side by side
    0: [(ALL, slice(0, 2)), (ALL, slice(4, 6))],
    1: [(ALL, slice(2, 4)), (ALL, slice(2, 4))],
}
BLOCKS = {  # both split
    process: [(slice(2 * process, 2 * process + 2), slice(x, x + 3)) for x in (0, 3)]
    for process in (0, 1)
}
COPIES = {process: [(ALL, slice(0, 3)), (ALL, slice(3, 6))] for process in (0, 1)}


@pytest.mark.parametrize(("split", "shapes", "owned"), [
    (APART, [(2, 4, 4), (2, 4, 2)], [2, 1]),
    (BLOCKS, [(2, 2, 6), (2, 2, 6)], [2, 2]),
    (COPIES, [(2, 4, 6), (2, 4, 6)], [2, 0]),
], ids=["columns apart", "experts and columns", "copies"])  # fmt: skip
def test_parts_together_are_the_whole_and_each_region_has_one_owner(
    monkeypatch, split, shapes, owned
):
    rng = np.random.default_rng(0)
    rows = rng.random((5, *ROW), np.float32)
    whole, written = np.full_like(rows, np.nan), np.zeros(ROW, int)
    for process, shape in enumerate(shapes):
        part = part_of(monkeypatch, process, split)
        assert part.shape == shape
        here = part.cut(rows)
        assert here.shape == (5, *shape)
        for region in part.mine:
            there = tuple(slice(*span) for span in region)
            whole[:, *there] = here[:, *part.here(region)]
            written[there] += part.owns(region)
        assert sum(map(part.owns, part.mine)) == owned[process]
    assert np.array_equal(whole, rows)
    assert (written == 1).all()


def test_a_piece_is_laid_where_it_belongs(monkeypatch):
    """One that begins and ends within regions, and lies over two of them."""
    part = part_of(monkeypatch, 0, APART)
    rows = np.random.default_rng(1).random((3, *ROW), np.float32)
    found = np.zeros((3, *part.shape), np.float32)
    piece, begin = rows[:, 1:, 1:3, 1:5], (1, 1, 1)
    for here, there in part.overlaps(begin, piece.shape[1:]):
        found[:, *here] = piece[:, *there]
    expected = np.zeros_like(rows)
    expected[:, 1:, 1:3, 1:5] = piece
    assert np.array_equal(found, part.cut(expected))
    assert np.count_nonzero(found) == 3 * 2 * 2  # columns 1 and 4


def test_parts_that_form_no_block_are_refused(monkeypatch):
    corners = {0: [(slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 6))]}
    with pytest.raises(ConfigError, match=r"no block.*mesh\.table_columns"):
        part_of(monkeypatch, 0, corners)
