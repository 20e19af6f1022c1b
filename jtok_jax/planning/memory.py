# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Bytes of a training step on one device, part by part, from shapes alone.

What lives between steps is exact: the shapes and shardings of the state. What a step adds is a
model of what XLA keeps and makes: which arrays live together at the widest point of the backward
pass. Its whole numbers were chosen by figures of XLA's compilers for TPUs and H100s (LOG.md).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.mesh import BATCH, num_shards
from jtok_jax.model.attention import QUERIES
from jtok_jax.model.params import declared, declared_tables
from jtok_jax.model.placement import entries_here, table_layouts
from jtok_jax.model.variables import Weight
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.rows import row_gradient_bytes
from jtok_jax.training.state import abstract_state


class Part(NamedTuple):
    """Bytes of one thing on one device.

    `when`: "state" lives between steps, "gradients" from the backward pass to the update, "kept"
    from the forward to the backward pass; of "backward" and "update" only the largest lives.
    """

    name: str
    size: int
    when: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """All parts; `total` is the most that lives at one time."""

    parts: tuple[Part, ...]

    def of(self, when: str) -> int:
        return sum(part.size for part in self.parts if part.when == when)

    @property
    def state(self) -> int:
        return self.of("state")

    @property
    def step(self) -> int:
        """What a step needs beside the state: the compiler's temporaries."""
        most = lambda when: max((p.size for p in self.parts if p.when == when), default=0)
        passes = self.of("kept") + most("backward")
        return self.of("gradients") + max(passes, most("update"))

    @property
    def total(self) -> int:
        return self.state + self.step


def memory(config: Config, mesh: AbstractMesh) -> Memory:
    """Memory of `config` on one device of `mesh`.

    Raises:
        ConfigError: the mesh does not divide what it splits.
    """
    shapes = _Shapes(config, mesh)
    parts = [
        *_state(_what_state_depends_on(config), mesh),
        Part("gradients of the backbone", shapes.sums * shapes.backbone_entries * 4, "gradients"),
        Part("gradients of rows", shapes.sums * _row_grads(shapes), "gradients"),
        Part("backbone in the compute dtype", _cast_weights(shapes), "kept"),
        Part("plan of rows", _plan(shapes), "kept"),
        Part("activations of all layers", shapes.model.num_layers * _saved(shapes), "kept"),
        Part("backward of a layer", _layer(shapes), "backward"),
        Part("loss and head", _head(shapes), "backward"),
        Part("update of the rows of a layer", _row_update(shapes), "update"),
    ]
    return Memory(tuple(part for part in parts if part.size))


def update_bytes(config: Config, mesh: AbstractMesh) -> int:
    """Read and written by the update on one device: value, gradient and two moments, float32."""
    shapes = _Shapes(config, mesh)
    entries = shapes.backbone_entries
    if config.optimizer.tables.kind == "adamw":
        return 28 * (entries + sum(map(shapes.entries, shapes.tables)))
    return 28 * entries + 7 * _row_grads(shapes)


class _Shapes:
    """Sizes of one device's part of everything."""

    def __init__(self, config: Config, mesh: AbstractMesh):
        self.config, self.mesh = config, mesh
        self.model, self.layouts = config.model, table_layouts(config, mesh)
        self.declared, self.tables = declared(config.model), declared_tables(config.model)
        self.compute = flops.BYTES[self.model.compute_dtype]
        batch = config.train.batch_size // config.train.grad_accumulation
        self.sequences = batch / num_shards(mesh, BATCH)
        self.length = config.train.seq_len
        self.tokens = self.sequences * self.length
        self.tensor = mesh.shape["tensor"]
        self.sums = 2 if config.train.grad_accumulation > 1 else 1  # of a microbatch, and of all

    def entries(self, name: str, *, gathered: bool = False, layer: bool = False) -> int:
        """Entries of a parameter here; whole along D, or of one layer."""
        whole = "D" if gathered else ""
        entries = entries_here(self.config, self.mesh, name, whole=whole)
        return entries // self.model.num_layers if layer else entries

    @property
    def backbone_entries(self) -> int:
        return sum(self.entries(name) for name in self.declared if name not in self.tables)

    @property
    def matrices(self) -> list[str]:
        """Of the layers, those that matmuls read."""
        in_layers = {name: one for name, one in self.declared.items() if one.axes[0] == "L"}
        return [
            name
            for name, one in in_layers.items()
            if issubclass(one.kind, Weight) and not one.full_precision
        ]


def _what_state_depends_on(config: Config) -> Config:
    """Equal for configurations that differ in steps alone: `_state` is counted once for them."""
    model = dataclasses.replace(config.model, remat="none", attention="xla", loss_chunk=0)
    return Config(model=model, optimizer=config.optimizer, mesh=config.mesh)


@functools.cache
def _state(config: Config, mesh: AbstractMesh) -> tuple[Part, ...]:
    """Exact, but for what a TPU pads of narrow arrays."""
    state = abstract_state(config, make_optimizer(config), mesh)
    sizes = dict.fromkeys(("backbone", "AdamW moments", "tables", "row optimizer"), 0)
    tables = declared_tables(config.model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        of_tables = any(key in tables for key in keys)
        local = leaf.sharding.shard_shape(leaf.shape)
        moment = "opt_state" in jax.tree_util.keystr(path)
        kind = ("row optimizer" if moment else "tables") if of_tables else "backbone"
        kind = "AdamW moments" if moment and not of_tables else kind
        sizes[kind] += math.prod(local) * leaf.dtype.itemsize
    return tuple(Part(name, size, "state") for name, size in sizes.items())


def _plan(shapes: _Shapes) -> int:
    """Ids of all devices, sorted with their places: 4 arrays of int32."""
    train, streams = shapes.config.train, {table.stream for table in shapes.tables.values()}
    ids = sum(shapes.model.id_streams[name].heads for name in streams)
    return 16 * train.batch_size * train.seq_len * ids


def _row_grads(shapes: _Shapes) -> int:
    """Return bytes of the row gradients of all tables."""
    return sum(row_gradient_bytes(shapes.config, shapes.mesh, name) for name in shapes.tables)


def _cast_weights(shapes: _Shapes) -> int:
    """XLA casts all layers at once, before the loop over them."""
    if shapes.compute == flops.BYTES[shapes.model.param_dtype]:
        return 0
    return sum(shapes.entries(name) for name in shapes.matrices) * shapes.compute


def _saved(shapes: _Shapes, remat: str | None = None) -> int:
    """What remat keeps of one layer; `model.remat` unless another is named."""
    model, jtok, moe = shapes.model, shapes.model.jtok, shapes.model.moe
    remat = remat or model.remat
    dim, query = model.model_dim, model.num_heads * model.head_size
    heads = (query + 2 * model.num_kv_heads * model.head_size) / shapes.tensor
    width = (moe.shared_dim if moe.num_experts else model.ffn_dim) / shapes.tensor
    kept = dim  # the input of the layer
    if remat != "full":
        kept += heads + dim + 2 * width  # results of matmuls that a gradient needs
        if model.attention == "splash":  # what it returns, or the forward pass would run twice
            kept += query / shapes.tensor
        fetched, gated = jtok.kind != "none" and shapes.mesh.size > 1, jtok.kind == "jtok"
        kept += (fetched + gated) * dim / shapes.tensor  # rows, and the increment a gate needs
    if remat == "none":
        kept += 10 * dim + heads + 4 * width  # norms, partly float32; rotations; activations
        if moe.num_experts:
            kept += moe.top_k * (2 * dim + 5 * moe.expert_dim / shapes.tensor)
    return int(shapes.tokens * kept * shapes.compute)


def _layer(shapes: _Shapes) -> int:
    """Matrices of a layer as gathered, their gradients, and the widest the backward pass gets."""
    weights = sum(shapes.entries(name, gathered=True, layer=True) for name in shapes.matrices)
    widest = max(_attention(shapes), _feed_forward(shapes))
    made = _saved(shapes, "dots") + widest + _mixture(shapes)
    return int(2 * weights * shapes.compute + made)


def _attention(shapes: _Shapes) -> float:
    """Return bytes of one layer's attention in the backward pass.

    Probabilities and their gradients are float32. "chunked" has those of some queries, and
    kernels have none.
    """
    model = shapes.model
    heads = model.num_heads / shapes.tensor
    flat = 4 * shapes.tokens * heads * model.head_size * shapes.compute
    if model.attention in ("cudnn", "splash"):
        return flat
    queries = QUERIES if model.attention == "chunked" else shapes.length
    return flat + 2 * 4 * shapes.sequences * heads * min(queries, shapes.length) * shapes.length


def _feed_forward(shapes: _Shapes) -> float:
    """Of experts: rows sorted, put back, and the gradients of both."""
    model, moe = shapes.model, shapes.model.moe
    if not moe.num_experts:
        return 4 * shapes.tokens * model.ffn_dim / shapes.tensor * shapes.compute
    rows = shapes.tokens * shapes.mesh.shape["expert"] * moe.top_k
    width = moe.expert_dim / shapes.tensor
    return rows * shapes.compute * 4 * (width + model.model_dim)


def _mixture(shapes: _Shapes) -> float:
    """Rows of the tokens of a group, the columns here: read, mixed, and their gradients."""
    made, used = 0.0, shapes.model.jtok.rows_per_token
    for name, table in shapes.tables.items():
        layout, stream = shapes.layouts[name], shapes.model.id_streams[table.stream]
        tokens = shapes.tokens / shapes.tensor * num_shards(shapes.mesh, layout.axes)
        columns = table.shape[-1] // num_shards(shapes.mesh, layout.columns)
        each = used if len(table.shape) == 4 else stream.heads
        made += tokens * columns * (8 * each + 10) * bool(table.layers)
    return made


def _head(shapes: _Shapes) -> int:
    """Logits of a chunk, and the head as gathered with its float32 gradient."""
    model = shapes.model
    vocab = model.padded_vocab / shapes.tensor
    logits = min(model.loss_chunk or math.inf, shapes.tokens) * vocab * 4
    return int(logits + vocab * model.model_dim * (shapes.compute + 4))


def _row_update(shapes: _Shapes) -> int:
    """Rows of one layer with two moments, before and after, float32; of the largest table."""
    if shapes.config.optimizer.tables.kind == "adamw":  # a dense gradient of the whole table
        return max((4 * shapes.entries(name) for name in shapes.tables), default=0)
    of_layers = {
        row_gradient_bytes(shapes.config, shapes.mesh, name) // (len(table.layers) or 1)
        for name, table in shapes.tables.items()
    }
    return 6 * max(of_layers, default=0)
