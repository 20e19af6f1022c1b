# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Estimates what a step sends and how long it takes at stated rates; it measures nothing."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.mesh import BATCH, num_shards
from jtok_jax.model.params import declared, declared_tables
from jtok_jax.model.placement import entries_here, table_layouts
from jtok_jax.model.tables import ROWS
from jtok_jax.planning.memory import update_bytes
from jtok_jax.planning.topology import Topology
from jtok_jax.store.rows import abstract_rows, bytes_of, stacked_shardings, whole_leaves
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.rows import row_gradient_bytes

MATMUL_SHARE = 0.6  # of a chip's peak that matmuls of this size reach; assumed
MEMORY_SHARE = 0.75  # of its memory rate that row operations reach; assumed
LINK_SHARE = 0.7  # of the rate of its links that collectives, or rows, reach; assumed
BATCHES = 16  # sizes that are tried, each twice the one before


class Collective(NamedTuple):
    """Bytes that one device sends in a step, all layers together."""

    name: str
    kind: str
    axes: tuple[str, ...]
    size: int


class Time(NamedTuple):
    """Seconds of a step: matmuls; row operations, loss and optimizer; collectives."""

    matmuls: float
    memory: float
    collectives: float

    @property
    def least(self) -> float:
        """Return seconds if every collective runs behind computation."""
        return max(self.matmuls + self.memory, self.collectives)

    @property
    def most(self) -> float:
        """Return seconds if none does."""
        return self.matmuls + self.memory + self.collectives


class HostRows(NamedTuple):
    """Tables in host memory: bytes they take there, and what rows of them a step moves."""

    host: int  # tables with what their optimizer keeps, and streamed rows, that one host holds
    of_device: int  # what one device would hold of them
    each_way: int  # bytes a step to one device, and back; at most
    rate: float  # bytes a second that this needs each way, to hide behind the least time of a step
    link: float  # bytes a second between a host and a device, as stated; 0: it is not
    batch_size: int | None  # sequences from which on it hides; None: no batch tried does

    @property
    def hides(self) -> bool:
        return self.rate <= LINK_SHARE * self.link


def host_rows(config: Config, mesh: AbstractMesh, topology: Topology) -> HostRows | None:
    """Return what tables in host memory need; None: they are on devices.

    Every token of a batch counts as a different id, up to the rows of a table.
    """
    if config.mesh.table_memory != "host" or not declared_tables(config.model):
        return None
    link = topology.chip.host_link

    def moved(batch_size: int) -> tuple[int, float]:
        train = dataclasses.replace(config.train, batch_size=batch_size)
        one = dataclasses.replace(config, train=train)
        size = _moved_each_way(one, mesh)
        return size, size / step_time(one, mesh, topology).least

    least = config.train.grad_accumulation * num_shards(mesh, BATCH)
    sizes = [least << power for power in range(BATCHES)]
    hides = lambda size: moved(size)[1] <= LINK_SHARE * link
    found = list(itertools.takewhile(hides, reversed(sizes)))
    each_way, rate = moved(config.train.batch_size)
    host, of_device = _held(config, mesh, topology.devices_per_host)
    if config.mesh.table_streaming:  # rows before and after a step, gradients of layers and stacks
        leaves = abstract_rows(config, mesh, make_optimizer(config).rows).leaves
        grads = sum(row_gradient_bytes(config, mesh, name) for name in leaves)
        host += topology.devices_per_host * 2 * (bytes_of(leaves) + grads)
    return HostRows(host, of_device, each_way, rate, link, found[-1] if found else None)


def _moved_each_way(config: Config, mesh: AbstractMesh) -> int:
    """Return the bytes that a step moves to one device or from it, whichever is more.

    Streamed rows are moved for every forward and backward pass and for the update. Their gradients
    are read for the norm and for the update, and twice to be summed over microbatches.
    """
    leaves = abstract_rows(config, mesh, make_optimizer(config).rows).leaves
    moved, passes = bytes_of(leaves), config.train.grad_accumulation
    if config.mesh.table_streaming:
        grads = sum(row_gradient_bytes(config, mesh, name) for name in leaves)
        for name, table in declared_tables(config.model).items():
            of_layer = bytes_of({name: leaves[name][ROWS]}) // table.shape[0]
            moved += 2 * passes * table.reads * of_layer
        moved += 2 * grads * (1 + passes * (passes > 1))
    return moved


def _held(config: Config, mesh: AbstractMesh, devices: int) -> tuple[int, int]:
    """Return the bytes of tables that a host of so many devices holds, and those of one device."""
    whole = whole_leaves(config.model, make_optimizer(config).rows)
    shardings = stacked_shardings(config, mesh, whole)
    numbers = np.unravel_index(np.arange(devices), tuple(mesh.shape.values()))
    along = dict(zip(mesh.shape, numbers, strict=True))  # of every device of the first host
    host = device = 0
    for name, leaves in whole.items():
        for leaf, x in leaves.items():
            spec = [(of,) if isinstance(of, str) else of or () for of in shardings[name][leaf].spec]
            axes = tuple(itertools.chain(*spec))
            size = x.size * x.dtype.itemsize // num_shards(mesh, axes)
            parts = set(zip(*(along[axis] for axis in axes), strict=True)) or {()}
            host, device = host + size * len(parts), device + size
    return host, device


def collectives(config: Config, mesh: AbstractMesh) -> list[Collective]:
    """Return the collectives of one step, those that send most first."""
    model, shape = config.model, mesh.shape
    wire, dim, layers = flops.BYTES[model.compute_dtype], model.model_dim, model.num_layers
    tokens = config.train.batch_size * config.train.seq_len // num_shards(mesh, BATCH)
    passes = config.train.grad_accumulation
    found = []

    def add(name, kind, axes, whole, times=1):
        """Add one of `whole` bytes, gathered or unreduced: a device sends all but its part."""
        axes = tuple(name for name in axes if shape[name] > 1)
        factor = 2 if kind == "all-reduce" else 1
        size = int(times * factor * whole * (1 - 1 / num_shards(mesh, axes)))
        if size:
            found.append(Collective(name, kind, axes, size))

    of_fsdp, gathered = 0, 0  # entries along D; and how many of them a pass gathers
    experts, others = 0, 0  # entries here
    for name, one in declared(model).items():
        if one.is_table or one.is_index:
            continue
        local = entries_here(config, mesh, name)
        along = local * shape["fsdp"] * ("D" in one.axes)
        of_fsdp += along
        gathered += along * (1 if one.axes == "DV" else 2)  # the loss comes with its gradients
        experts += local * ("E" in one.axes)
        others += local * ("E" not in one.axes)
    add("weights", "all-gather", ("fsdp",), gathered * wire, times=passes)
    add("gradients", "reduce-scatter", ("fsdp",), of_fsdp * wire, times=passes)
    add("gradients", "all-reduce", ("data", "expert"), others * wire, times=passes)
    add("gradients of experts", "all-reduce", ("data",), experts * wire, times=passes)
    activations = tokens * dim * wire * layers
    add("activations", "all-reduce", ("tensor",), activations, times=4)
    if model.moe.num_experts:
        gathered = activations * shape["expert"]
        add("tokens to experts", "all-gather", ("expert",), gathered, times=2)
        add("tokens from experts", "reduce-scatter", ("expert",), gathered, times=2)
    tables, layouts = declared_tables(model), table_layouts(config, mesh)
    plans = {(table.stream, layouts[name]) for name, table in tables.items()}
    for stream, _ in sorted(plans):  # tables of one stream and layout share their ids
        ids = 4 * config.train.batch_size * config.train.seq_len * model.id_streams[stream].heads
        add(f"ids of {stream}" if len(plans) > 1 else "ids", "all-gather", tuple(shape), ids)
    for name, table in tables.items():
        layout, stream = layouts[name], model.id_streams[table.stream]
        carrying = table.reads
        here = tokens / shape["tensor"] * stream.heads
        rows = here * table.shape[-1] * wire * carrying
        of_table = f" of {name}" if len(tables) > 1 else ""
        if len(table.shape) == 4:
            routed = 8 * model.jtok.top_k * here * carrying * num_shards(mesh, layout.axes)
            add("router weights", "all-gather", layout.axes, routed, times=1.5)
        add(f"rows{of_table}, columns of them", "all-to-all", layout.columns, rows, times=2)
        copies = tuple(axis for axis in shape if axis not in layout.axes)
        size = row_gradient_bytes(config, mesh, name)
        add(f"gradients of rows{of_table}", "all-reduce", copies, size, passes)
        summed = layout.experts + layout.rows
        partial = rows * num_shards(mesh, summed)
        add(f"rows{of_table}, sums of them", "reduce-scatter", summed, partial, times=2)
    return sorted(found, key=lambda one: -one.size)


def step_time(config: Config, mesh: AbstractMesh, topology: Topology) -> Time:
    """Return seconds at stated rates, collectives in turn, each at its slowest link."""
    chip, model = topology.chip, config.model
    counts = flops.count(model, seq_len=config.train.seq_len)
    tokens = config.train.batch_size * config.train.seq_len / mesh.size
    again = counts.forward_flops if model.remat == "full" else 0
    work = tokens * (counts.train_flops + again)
    moved = _row_bytes(config, tokens) + _loss_bytes(config, mesh) + update_bytes(config, mesh)
    sent = sum(
        one.size / (LINK_SHARE * _rate(one, mesh, topology)) for one in collectives(config, mesh)
    )
    return Time(
        matmuls=work / (MATMUL_SHARE * chip.peak_flops),
        memory=moved / (MEMORY_SHARE * chip.memory_rate),
        collectives=sent,
    )


def mfu(config: Config, topology: Topology, seconds: float) -> float:
    """Return the useful FLOPs of a step over what the chips could do in `seconds`."""
    counts = flops.count(config.model, seq_len=config.train.seq_len)
    tokens = config.train.batch_size * config.train.seq_len
    return tokens * counts.train_flops / (seconds * topology.devices * topology.chip.peak_flops)


def _row_bytes(config: Config, tokens: float) -> float:
    """Return bytes that row operations move: rows, increments, outputs, there and back."""
    model, moved = config.model, 0.0
    wide = flops.BYTES[model.compute_dtype]
    for table in declared_tables(model).values():
        heads = model.id_streams[table.stream].heads
        used = table.top_k or heads
        entry = 2 * used * table.dtype.itemsize + 6 * wide + 4 * used
        carrying = table.reads
        moved += tokens * table.shape[-1] * entry * carrying
    return moved


def _loss_bytes(config: Config, mesh: AbstractMesh) -> float:
    """Return the bytes that the loss reads and writes.

    Each chunk reads the head twice and adds to its gradient. Logits are written and read twice in
    float32; their gradient is written once and read twice.
    """
    model, passes = config.model, config.train.grad_accumulation
    tokens = config.train.batch_size * config.train.seq_len / num_shards(mesh, BATCH)
    chunks = passes * math.ceil(tokens / passes / (model.loss_chunk or math.inf) or 1)
    wide, vocab = flops.BYTES[model.compute_dtype], model.padded_vocab / mesh.shape["tensor"]
    return vocab * (chunks * model.model_dim * (2 * wide + 8) + tokens * (3 * 4 + 3 * wide))


def _rate(one: Collective, mesh: AbstractMesh, topology: Topology) -> float:
    """Return bytes a second out of a device; those that leave a host of GPUs share adapters.

    Devices along the last mesh axes lie next to each other. In a ring only one device of a host
    sends to the next host, by all adapters of the group's devices there.
    """
    chip, names = topology.chip, list(mesh.shape)
    after = names[max(names.index(name) for name in one.axes) + 1 :]
    together = topology.devices_per_host // num_shards(mesh, tuple(after))
    size = num_shards(mesh, one.axes)
    together = max(1, min(size, together))  # devices of a group on a host
    if not chip.network or together == size:
        return chip.link
    if one.kind == "all-to-all":
        return min(chip.link, chip.network / (1 - together / size))
    return min(chip.link, chip.network * together)
