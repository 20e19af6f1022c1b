# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The device mesh, and the one table that says which axis letter is split over which mesh axis."""

import bisect
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jtok_jax.checks import names
from jtok_jax.config import Config, MeshConfig
from jtok_jax.errors import ConfigError

AXES = ("data", "fsdp", "expert", "tensor")
AUTO = (AxisType.Auto,) * len(AXES)
BATCH = ("data", "fsdp", "expert")  # split the sequences of a batch
TOKENS = PartitionSpec(BATCH, "tensor")  # of [B, T] in shard_map: every device has its own tokens
COLUMNS = 128  # "auto" leaves a multiple on a device: a TPU's lanes, what kernels take

_PAD = ", or set model.vocab_multiple"
_PAD_ROWS = ", or set model.vocab_multiple (n-grams: another number of rows in model.streams)"
Rules = Mapping[str, tuple[str, ...]]  # axis letter -> mesh axes

# Every matrix has one D. Letters of the tables (X, R, C) follow `TableLayout`.
RULES: Rules = {
    "D": ("fsdp",), "E": ("expert",),
    "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "S": ("tensor",), "V": ("tensor",),
}  # fmt: skip


# What a size of a split axis comes from.
FIELDS = {
    "D": "model.model_dim", "E": "model.moe.num_experts", "N": "model.num_heads",
    "K": "model.num_kv_heads", "F": "model.ffn_dim, or model.moe.expert_dim,",
    "S": "a number of slots in model.pattention, or model.moe.shared_dim,", "V": "model.vocab_size",
}  # fmt: skip


class TableLayout(NamedTuple):
    """Mesh axes that split the tables; those it does not name hold copies."""

    columns: tuple[str, ...]  # D: lookups are balanced whatever the ids are
    experts: tuple[str, ...]  # the n_e tables of JTok-M
    rows: tuple[str, ...]  # V

    @property
    def axes(self) -> tuple[str, ...]:
        return self.columns + self.experts + self.rows


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Return the devices along each of `AXES`; mesh.data -1 takes what is left.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    others = config.fsdp * config.expert * config.tensor
    data = devices // others if config.data == -1 else config.data
    shape = (data, config.fsdp, config.expert, config.tensor)
    if config.data == -1 and devices % others:
        raise ConfigError(
            f"mesh.fsdp x expert x tensor is {others}, which does not divide the {devices} "
            f"devices there are. Choose other sizes; a CPU simulates 8 with "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8."
        )
    if math.prod(shape) != devices:
        raise ConfigError(
            f"mesh.data x fsdp x expert x tensor is {' x '.join(map(str, shape))} but there are "
            f"{devices} devices; choose sizes whose product divides that and mesh.data -1."
        )
    return shape


def make_mesh(config: MeshConfig) -> Mesh:
    """Return the mesh of `AXES` over all devices; one device is a mesh of ones.

    Raises:
        ConfigError: see `mesh_shape`.
    """
    shape = mesh_shape(config, jax.device_count())
    return jax.make_mesh(shape, AXES, axis_types=AUTO)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """Return the mesh of as many devices that are not here: for shapes and shardings alone."""
    return AbstractMesh(mesh_shape(config, devices), AXES, axis_types=AUTO)


def table_layout(options: MeshConfig, mesh: Mesh, name: str, shape: tuple[int, ...]) -> TableLayout:
    """Return how a stack of tables lies on `mesh`, by mesh.table_columns and its like.

    Args:
        shape: [G, R, D], or [G, M, R, D]; only the second is split along M.

    Raises:
        ConfigError: an axis is unknown, named twice, or does not divide what it splits.
    """
    experts, rows = names(options.table_experts), names(options.table_rows)
    experts = experts if len(shape) == 4 else ()
    if options.table_columns in ("auto", "fit"):
        multiple = COLUMNS if options.table_columns == "auto" else 1
        columns = _columns_that_fit(shape[-1], mesh, taken=experts + rows, multiple=multiple)
    else:
        columns = names(options.table_columns)
    layout = TableLayout(columns, experts, rows)
    for axis in layout.axes:
        if axis not in AXES:
            raise ConfigError(f"mesh.table_*: there is no axis {axis!r}; axes: {', '.join(AXES)}.")
        if layout.axes.count(axis) > 1:
            raise ConfigError(f"mesh.table_*: axis {axis!r} is named twice; it splits one thing.")
    for what, size in {"columns": shape[-1], "experts": shape[-3], "rows": shape[-2]}.items():
        count = num_shards(mesh, getattr(layout, what))
        if size % count:
            axes = ",".join(getattr(layout, what))
            raise ConfigError(
                f"mesh.table_{what} is {axes!r}, {count} devices, which do not divide the {size} "
                f"{what} of {name}; name axes whose sizes do{_PAD_ROWS if what == 'rows' else ''}."
            )
    return layout


def table_rules(layout: TableLayout) -> Rules:
    """Return the mesh axes of every axis letter of a table."""
    return {"C": layout.columns, "X": layout.experts, "R": layout.rows}


def sharding(mesh: Mesh, rules: Rules, letters: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of an array with axis `letters`.

    Raises:
        ConfigError: an axis does not divide among its devices.
    """
    axes = [rules.get(letter, ()) for letter in letters]
    for letter, of_axis, size in zip(letters, axes, shape, strict=True):
        if size % num_shards(mesh, of_axis):
            raise ConfigError(
                f"{FIELDS.get(letter, f'axis {letter}')} is {size}, which mesh.{of_axis[0]} = "
                f"{num_shards(mesh, of_axis)} devices do not divide; choose a divisor"
                f"{_PAD if letter == 'V' else ''}."
            )
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in axes)))


def num_shards(mesh: Mesh, names: tuple[str, ...]) -> int:
    """Return the parts that mesh axes split an array into."""
    return math.prod(mesh.shape[name] for name in names)


def check_batches(config: Config, mesh: Mesh, *, training: bool = True) -> None:
    """Refuse batches that the devices cannot share evenly: of evaluation, and of training."""
    train, count = config.train, num_shards(mesh, BATCH)
    sizes = {"evaluation.batch_size (evaluate: --batch_size)": config.evaluation.batch_size}
    if training:
        sizes["train.batch_size / grad_accumulation"] = train.batch_size // train.grad_accumulation
    for name, size in sizes.items():
        if size % count:
            raise ConfigError(
                f"{name} is {size}; expected a multiple of the {count} devices that share it."
            )
    split = config.model.streams_read or config.model.moe.num_experts
    if split and train.seq_len % mesh.shape["tensor"]:
        raise ConfigError(
            f"train.seq_len is {train.seq_len}; expected a multiple of mesh.tensor "
            f"({mesh.shape['tensor']}): for tables and experts it splits a sequence's tokens."
        )


def split_batch(mesh: Mesh) -> NamedSharding:
    """Return a sharding: the first axis over all devices but those of one tensor group."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def split_columns(mesh: Mesh) -> NamedSharding:
    """Return a sharding of [B, T, D]: D as in parameters, B over what is left."""
    left = tuple(name for name in BATCH if name not in RULES["D"])
    return NamedSharding(mesh, PartitionSpec(left, None, RULES["D"]))


@functools.cache
def rows_here(mesh: Mesh, size: int, *, whole: bool = False) -> tuple[int, ...]:
    """Return which sequences of a batch of `size` this process reads, ascending.

    They are those that its devices need. whole: all, as for tables in host memory.
    """
    if whole:
        return tuple(range(size))
    parts = split_batch(mesh).addressable_devices_indices_map((size,)).values()
    return tuple(sorted({row for (part,) in parts for row in range(*part.indices(size))}))


def put_batch(mesh: Mesh, array: np.ndarray, *, size: int | None = None) -> jax.Array:
    """Return a batch on the devices, split along its first axis.

    size: sequences of the batch, of which `array` has those of `rows_here`, or all; None: all.
    """
    size = size or len(array)
    rows = range(size) if len(array) == size else rows_here(mesh, size)

    def part(index):
        start, stop, _ = index[0].indices(size)
        first = bisect.bisect_left(rows, start)
        return array[first : first + stop - start]

    return jax.make_array_from_callback((size, *array.shape[1:]), split_batch(mesh), part)


def put_whole(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Return an array that is whole on every device, as every process has it."""
    return jax.make_array_from_callback(array.shape, replicated(mesh), array.__getitem__)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _columns_that_fit(
    dim: int, mesh: Mesh, *, taken: tuple[str, ...], multiple: int
) -> tuple[str, ...]:
    """Return as many axes as leave a multiple of columns on a device, those of parameters first."""
    chosen, left = (), dim
    for name in ("fsdp", "tensor", "expert", "data"):
        size = mesh.shape[name]
        if name not in taken and size > 1 and left % (size * multiple) == 0:
            chosen, left = (*chosen, name), left // size
    return chosen
