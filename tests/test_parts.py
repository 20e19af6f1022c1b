# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which part of a table each of several processes holds, for devices that are not here."""

import collections
import types
from typing import NamedTuple

import numpy as np
import pytest
import tensorstore

from jtok_jax.arms_config import ArmsConfig
from jtok_jax.config import Config, MeshConfig
from jtok_jax.errors import CheckpointError, ConfigError
from jtok_jax.mesh import make_mesh
from jtok_jax.model_config import JtokConfig, ModelConfig
from jtok_jax.store import part as part_module
from jtok_jax.store import tables as table_module
from jtok_jax.store.part import Part
from jtok_jax.store.pieces import read_pieces
from jtok_jax.store.tables import HostTables
from jtok_jax.training import digest

ARMS = ArmsConfig(names="ngram")

ROW = 2, 4, 6  # layers, experts, columns


class Device(NamedTuple):
    process_index: int
    number: int


def part_of(monkeypatch, process: int, indices: dict[int, list[tuple[slice, slice]]]) -> Part:
    """The part of `process`, whose devices have each these (experts, columns)."""
    devices = {
        Device(owner, number): (
            slice(None), index[0], slice(None), index[1],
        )
        for owner, of in indices.items()
        for number, index in enumerate(of)
    }  # fmt: skip
    sharding = types.SimpleNamespace(
        is_fully_addressable=False, devices_indices_map=lambda shape: devices
    )
    monkeypatch.setattr(part_module.jax, "process_index", lambda: process)
    return Part(ROW, sharding, axis=2)


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


@pytest.mark.parametrize(("split", "shapes", "copies"), [
    (APART, [(2, 4, 4), (2, 4, 2)], 1),
    (BLOCKS, [(2, 2, 6), (2, 2, 6)], 1),
    (COPIES, [(2, 4, 6), (2, 4, 6)], 2),
], ids=["columns apart", "experts and columns", "copies"])  # fmt: skip
def test_parts_together_are_the_whole_and_copies_are_shared_out(monkeypatch, split, shapes, copies):
    rng = np.random.default_rng(0)
    rows = rng.random((5, *ROW), np.float32)
    whole, replicas = np.full_like(rows, np.nan), collections.defaultdict(list)
    for process, shape in enumerate(shapes):
        part = part_of(monkeypatch, process, split)
        assert part.shape == shape
        here = part.local_rows(rows)
        assert here.shape == (5, *shape)
        for region in part.local_regions:
            there = tuple(slice(*span) for span in region)
            whole[:, *there] = here[:, *part.local_slices(region)]
            replicas[region].append(part.replica(region))
    assert np.array_equal(whole, rows)
    assert all(found == [(x, copies) for x in range(copies)] for found in replicas.values())


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
    assert np.array_equal(found, part.local_rows(expected))
    assert np.count_nonzero(found) == 3 * 2 * 2  # columns 1 and 4


def test_parts_that_form_no_block_are_refused(monkeypatch):
    corners = {0: [(slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 6))]}
    with pytest.raises(ConfigError, match=r"no block.*mesh\.table_columns"):
        part_of(monkeypatch, 0, corners)


def of_two(other):
    """Return an `of_all_processes` for two, of which the other one passes `other`."""
    return lambda own: np.stack([own, np.asarray(other, own.dtype)])


LEFT, RIGHT = ((0, 1), (0, 4)), ((0, 1), (4, 8))


def test_digests_of_regions_are_added_over_processes(monkeypatch):
    """2^32 - 1 of one here, 3 of the other there: modulo 2^32 they are 2."""
    monkeypatch.setattr(digest, "of_all_processes", of_two([(0, 0), (3, 1), (5, 1)]))
    regions = {"split": {LEFT: 2**32 - 1, RIGHT: None}, "copied": {LEFT: 5}}
    assert digest.digests_of_regions(regions) == {"split": 2, "copied": 5}


@pytest.mark.parametrize("other", [6, 4, 0])
def test_copies_that_differ_are_refused(monkeypatch, other):
    monkeypatch.setattr(digest, "of_all_processes", of_two([(other, 1), (7, 1)]))
    with pytest.raises(CheckpointError, match=r"different copies of params/a\. Nothing"):
        digest.digests_of_regions({"params/a": {LEFT: 5}, "params/b": {LEFT: 7}})


def test_a_row_of_another_process_that_is_not_finite_is_not_saved(monkeypatch):
    model = ModelConfig(jtok=JtokConfig(kind="jtok"), streams="bigram=2:300", arms=ARMS)
    config = Config(model=model, mesh=MeshConfig(table_memory="host"))
    tables = HostTables(config, make_mesh(config.mesh), {})
    assert tables.non_finite() == []
    names = list(tables.whole)
    assert len(names) == 2
    monkeypatch.setattr(table_module, "of_all_processes", of_two([False, True]))
    assert tables.non_finite() == names[1:]


@pytest.mark.parametrize("chunk", [(2, 5, 6), (1, 3, 2), (2, 4, 4)])
@pytest.mark.parametrize("regions", [[], [((0, 2), (0, 9), (0, 2)), ((0, 2), (0, 9), (4, 6))]])
def test_every_chunk_that_is_wanted_is_read_once(tmp_path, chunk, regions):
    """Chunks that are wider than what a process has, and others; a part is left at the end."""
    array = np.random.default_rng(2).random((2, 9, 6), np.float32)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "_METADATA").write_text('{"use_ocdbt": false}')
    store = tensorstore.open(
        {"driver": "zarr3", "kvstore": f"file://{tmp_path}/state/x/"},
        create=True, dtype="float32", shape=array.shape,
        chunk_layout=tensorstore.ChunkLayout(chunk_shape=chunk),
    ).result()  # fmt: skip
    store.write(array).result()
    found, times = np.zeros_like(array), np.zeros(array.shape, int)
    for begin, piece in read_pieces(tmp_path, "x", regions):
        place = tuple(slice(a, a + size) for a, size in zip(begin, piece.shape, strict=True))
        found[place], times[place] = piece, times[place] + 1
    wanted = np.zeros(array.shape, bool)
    for region in regions or [((0, 2), (0, 9), (0, 6))]:
        wanted[tuple(slice(*span) for span in region)] = True
    assert times.max() == 1
    assert np.array_equal(found[wanted], array[wanted])
    if chunk[2] == 2:
        assert np.array_equal(times > 0, wanted)  # no more than that
