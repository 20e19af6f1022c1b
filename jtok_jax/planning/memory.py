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
from jtok_jax.mesh import BATCH, axis_rules, num_shards, table_layout
from jtok_jax.model.attention import QUERIES
from jtok_jax.training.optimizer import make_optimizer
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


def row_gradient_bytes(config: Config, mesh: AbstractMesh) -> int:
    """Of one microbatch on one device: float32 [L, M, U, columns]."""
    return _row_grads(_Shapes(config, mesh))


def update_bytes(config: Config, mesh: AbstractMesh) -> int:
    """Read and written by the update on one device: value, gradient and two moments, float32."""
    shapes = _Shapes(config, mesh)
    entries = shapes.backbone_entries
    if config.optimizer.tables.kind == "adamw" and "tables" in shapes.axes:
        return 28 * (entries + shapes.entries("tables"))
    return 28 * entries + 7 * _row_grads(shapes)


class _Shapes:
    """Sizes of one device's part of everything."""

    def __init__(self, config: Config, mesh: AbstractMesh):
        self.config, self.mesh = config, mesh
        self.model, self.layout = config.model, table_layout(config, mesh)
        self.rules = axis_rules(config, mesh)
        self.axes, self.sizes = flops.parameter_axes(self.model), flops.axis_sizes(self.model)
        self.compute = flops.BYTES[self.model.compute_dtype]
        batch = config.train.batch_size // config.train.grad_accumulation
        self.sequences = batch / num_shards(mesh, BATCH)
        self.length = config.train.seq_len
        self.tokens = self.sequences * self.length
        self.tensor = mesh.shape["tensor"]
        self.sums = 2 if config.train.grad_accumulation > 1 else 1  # of a microbatch, and of all

    def entries(self, name: str, *, gathered: bool = False, layer: bool = False) -> int:
        """Entries of a parameter here; whole along D, or of one layer."""
        letters = self.axes[name][1:] if layer else self.axes[name]
        split = lambda letter: not (gathered and letter == "D")
        return math.prod(
            self.sizes[x] // (num_shards(self.mesh, self.rules.get(x, ())) if split(x) else 1)
            for x in letters
        )

    @property
    def backbone_entries(self) -> int:
        return sum(self.entries(name) for name in self.axes if name != "tables")

    @property
    def matrices(self) -> list[str]:
        """Of the layers, those that matmuls read."""
        vectors = (*flops.VECTORS, "router")
        return [name for name in self.axes if "blocks/" in name and not name.endswith(vectors)]

    @property
    def columns(self) -> int:
        """Entries of a row here."""
        return self.model.model_dim // num_shards(self.mesh, self.layout.columns)

    @property
    def num_tables(self) -> int:
        return self.model.jtok.tables_per_layer // num_shards(self.mesh, self.layout.experts)

    @property
    def unique_rows(self) -> int:
        """U of one device: rows of other devices count as the first or the last one here."""
        here = self.model.padded_vocab // num_shards(self.mesh, self.layout.rows)
        return min(self.config.rows_per_step + 2 * bool(self.layout.rows), here)


def _what_state_depends_on(config: Config) -> Config:
    """Equal for configurations that differ in steps alone: `_state` is counted once for them."""
    model = dataclasses.replace(config.model, remat="none", attention="xla", loss_chunk=0)
    return Config(model=model, optimizer=config.optimizer, mesh=config.mesh)


@functools.cache
def _state(config: Config, mesh: AbstractMesh) -> tuple[Part, ...]:
    """Exact, but for what a TPU pads of narrow arrays."""
    state = abstract_state(config, make_optimizer(config), mesh)
    sizes = dict.fromkeys(("backbone", "AdamW moments", "tables", "row optimizer"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        of_tables = "tables" in name
        local = leaf.sharding.shard_shape(leaf.shape)
        moment = "opt_state" in name
        kind = ("row optimizer" if moment else "tables") if of_tables else "backbone"
        kind = "AdamW moments" if moment and not of_tables else kind
        sizes[kind] += math.prod(local) * leaf.dtype.itemsize
    return tuple(Part(name, size, "state") for name, size in sizes.items())


def _plan(shapes: _Shapes) -> int:
    """Ids of all devices, sorted with their places: 4 arrays of int32."""
    train = shapes.config.train
    return 16 * train.batch_size * train.seq_len if shapes.model.tables_shape else 0


def _row_grads(shapes: _Shapes) -> int:
    """float32 [L, M, U, columns]."""
    if shapes.model.tables_shape is None:
        return 0
    rows = shapes.model.num_layers * shapes.num_tables * shapes.unique_rows
    return rows * shapes.columns * 4


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
    if shapes.model.tables_shape is None:
        return 0
    tokens = shapes.tokens / shapes.tensor * num_shards(shapes.mesh, shapes.layout.axes)
    return tokens * shapes.columns * (8 * shapes.model.jtok.rows_per_token + 10)


def _head(shapes: _Shapes) -> int:
    """Logits of a chunk, and the head as gathered with its float32 gradient."""
    model = shapes.model
    vocab = model.padded_vocab / shapes.tensor
    logits = min(model.loss_chunk or math.inf, shapes.tokens) * vocab * 4
    return int(logits + vocab * model.model_dim * (shapes.compute + 4))


def _row_update(shapes: _Shapes) -> int:
    """Rows of one layer with two moments, before and after, float32."""
    if shapes.model.tables_shape is None:
        return 0
    if shapes.config.optimizer.tables.kind == "adamw":
        return shapes.entries("tables") * 4  # a dense gradient of all tables
    return shapes.num_tables * shapes.unique_rows * shapes.columns * 4 * 6
