# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Counts the bytes of a training step on one device, part by part, from shapes alone.

What lives between steps is exact: the shapes and shardings of the state. What the backward pass
needs of the forward pass is counted in a trace. Which arrays live together at its widest point is
a model: its whole numbers were chosen by figures of XLA's compilers for TPUs and H100s (LOG.md).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from jtok_jax import flops
from jtok_jax.checks import names
from jtok_jax.config import Config
from jtok_jax.mesh import AUTO, AXES, BATCH, num_shards
from jtok_jax.model.attention import QUERIES, causal
from jtok_jax.model.host_memory import KIND
from jtok_jax.model.params import abstract_params, bind, declared, declared_tables
from jtok_jax.model.placement import entries_here, table_layouts
from jtok_jax.model.splash import SAVED
from jtok_jax.model.tables import Rows
from jtok_jax.model.variables import Weight
from jtok_jax.model_config import ModelConfig
from jtok_jax.store.rows import abstract_rows, bytes_of
from jtok_jax.streams import FREQUENT
from jtok_jax.training.optimizer import groups, make_optimizer
from jtok_jax.training.rows import make_plans, parallel_reads, row_gradient_bytes, zero_row_grads
from jtok_jax.training.state import abstract_state

PRIME = 8191  # tokens of a traced sequence: only what is kept for every token has a multiple


class Part(NamedTuple):
    """Bytes that one thing takes on one device.

    `when`: "state" lives between steps, "gradients" from the backward pass to the update,
    "residuals" from the forward to the backward pass. Of "backward" and "update" only the largest
    lives.
    """

    name: str
    size: int
    when: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """All parts; `total` is the most that lives at one time."""

    parts: tuple[Part, ...]

    def sizes(self, when: str) -> list[int]:
        return [part.size for part in self.parts if part.when == when]

    @property
    def state(self) -> int:
        return sum(self.sizes("state"))

    @property
    def step(self) -> int:
        """Return what a step needs beside the state: the compiler's temporaries."""
        passes = sum(self.sizes("residuals")) + max(self.sizes("backward"))
        return sum(self.sizes("gradients")) + max([passes, *self.sizes("update")])

    @property
    def total(self) -> int:
        return self.state + self.step


def memory(config: Config, mesh: AbstractMesh) -> Memory:
    """Return the memory that `config` takes on one device of `mesh`.

    Raises:
        ConfigError: the mesh does not divide what it splits.
    """
    shapes, model = _Shapes(config, mesh), config.model
    row_grads = shapes.sums * sum(map(shapes.row_grads, shapes.tables))
    if config.mesh.table_streaming:
        row_grads = sum(
            2 * shapes.row_grads(name) // table.grads_shape[0]
            for name, table in shapes.tables.items()
        )
    parts = [
        *_state(_what_state_depends_on(config), mesh),
        Part("rows of host tables, for steps", _rows_of_steps(shapes), "state"),
        Part("gradients of the backbone", shapes.sums * shapes.trained * 4, "gradients"),
        Part("gradients of rows", row_grads, "gradients"),
        Part("backbone in the compute dtype", _cast_weights(shapes), "residuals"),
        Part("plan of rows", _plan(shapes), "residuals"),
        Part("activations of all layers", model.num_layers * _residuals(shapes), "residuals"),
        Part("activations of A_f", _of_ngrams(shapes), "residuals"),
        Part("backward of a layer", _layer(shapes), "backward"),
        Part("loss and head", _head(shapes), "backward"),
        Part("update of the rows of a layer", _row_update(shapes), "update"),
    ]
    return Memory(tuple(part for part in parts if part.size))


def update_bytes(config: Config, mesh: AbstractMesh) -> int:
    """Return bytes the update moves on one device: value, gradient, two moments, in float32."""
    shapes = _Shapes(config, mesh)
    dense = [name for name in shapes.tables if shapes.is_dense(name)]
    rows = sum(shapes.row_grads(name) for name in shapes.tables if name not in dense)
    return 28 * (shapes.trained + sum(map(shapes.entries, dense))) + 7 * rows


class _Shapes:
    """Sizes of one device's part of everything; `trained` in entries, tables apart."""

    def __init__(self, config: Config, mesh: AbstractMesh):
        self.config, self.mesh, self.model = config, mesh, config.model
        self.declared, self.tables = declared(config.model), declared_tables(config.model)
        trained = groups(config.model, frozen=config.optimizer.frozen)
        self.trained = sum(map(self.entries, trained))
        self.compute = flops.BYTES[self.model.compute_dtype]
        batch = config.train.batch_size // config.train.grad_accumulation
        self.sequences = batch / num_shards(mesh, BATCH)
        self.length = config.train.seq_len
        self.tokens = self.sequences * self.length
        self.tensor = mesh.shape["tensor"]
        self.sums = 2 if config.train.grad_accumulation > 1 else 1  # of a microbatch, and of all

    def entries(self, name: str, *, whole: str = "") -> int:
        """Return the entries of a parameter here, if the axes `whole` are not split."""
        return entries_here(self.config, self.mesh, name, whole=whole)

    def is_dense(self, table: str) -> bool:
        """Return whether the optimizer of a table rewrites every row."""
        return self.config.optimizer.tables.of(self.tables[table].owner).kind == "adamw"

    def row_grads(self, table: str) -> int:
        """Return bytes of a table's row gradients."""
        return row_gradient_bytes(self.config, self.mesh, table)

    @property
    def matrices(self) -> list[str]:
        """Return the parameters of layers that matmuls read."""
        read = lambda one: issubclass(one.kind, Weight) and not one.full_precision
        return [name for name, one in self.declared.items() if one.axes[0] == "L" and read(one)]


def _what_state_depends_on(config: Config) -> Config:
    """Return what is equal where only steps differ: `_state` is counted once for them."""
    jtok = dataclasses.replace(config.model.jtok, implementation="auto")
    model = dataclasses.replace(config.model, jtok=jtok, remat="none", attention="xla")
    model = dataclasses.replace(model, loss_chunk=0)
    mesh = dataclasses.replace(config.mesh, table_streaming=False)
    return Config(model=model, optimizer=config.optimizer, mesh=mesh)


@functools.cache
def _state(config: Config, mesh: AbstractMesh) -> tuple[Part, ...]:
    """Return the parts of the state; exact, but for what a TPU pads of narrow arrays."""
    optimizer = make_optimizer(config)
    state = abstract_state(config, optimizer, mesh)
    kinds = (("backbone", "AdamW moments"), ("tables", "row optimizer"))
    sizes, tables = dict.fromkeys(sum(kinds, ()), 0), declared_tables(config.model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        moment = "opt_state" in jax.tree_util.keystr(path)
        kind = kinds[any(key in tables for key in keys)][moment]
        sizes[kind] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return tuple(Part(name, size, "state") for name, size in sizes.items())


def _rows_of_steps(shapes: _Shapes) -> int:
    """Return bytes of the rows of tables in host memory: of the step, and those around it.

    Some are read ahead, some are the results of steps before; one of these is being written. Of
    those that are streamed it is two layers: one is moved, and one is used.
    """
    config = shapes.config
    if config.mesh.table_memory != "host":
        return 0
    leaves = abstract_rows(config, shapes.mesh, make_optimizer(config).rows).leaves
    if not config.mesh.table_streaming:
        return bytes_of(leaves) * (2 + 2 * config.mesh.table_prefetch)
    streamed = {
        name: {leaf: x for leaf, x in one.items() if x.sharding.memory_kind == KIND}
        for name, one in leaves.items()
    }
    of_layer = lambda name: bytes_of({name: streamed[name]}) // shapes.tables[name].shape[0]
    return 2 * (bytes_of(leaves) - bytes_of(streamed) + sum(map(of_layer, shapes.tables)))


def _plan(shapes: _Shapes) -> int:
    """Return bytes of the ids of all devices, sorted with their places: 4 arrays of int32."""
    train, streams = shapes.config.train, {table.stream for table in shapes.tables.values()}
    ids = sum(shapes.model.id_streams[name].heads for name in streams)
    return 16 * train.batch_size * train.seq_len * ids


def _cast_weights(shapes: _Shapes) -> int:
    """Return bytes of cast weights: XLA casts all layers at once, before the loop over them."""
    cast = shapes.compute != flops.BYTES[shapes.model.param_dtype]
    return sum(map(shapes.entries, shapes.matrices)) * shapes.compute * cast


def _residuals(shapes: _Shapes, remat: str | None = None) -> int:
    """Return bytes that one layer keeps for its backward pass, as `remat` or the model says.

    On several devices tables and experts split tokens over the tensor axis. Without them it splits
    heads and widths, and vectors of D entries are whole.
    """
    model = _without_ngram_model(shapes.model)
    vectors, others = _kept(model, shapes, remat)
    split = model.moe.num_experts or any(table.layers for table in shapes.tables.values())
    return int(shapes.tokens * (vectors / (shapes.tensor if split else 1) + others / shapes.tensor))


def _of_ngrams(shapes: _Shapes) -> int:
    """Return bytes that all layers of SCONE's A_f keep for its backward pass."""
    model = shapes.model
    if not model.arms.makes_ngrams:
        return 0
    own, scone = model.ngram_model, model.arms.scone
    nodes = min(scone.room, model.id_streams[scone.stream].order) * shapes.tokens
    vectors, others = _kept(own, shapes)
    return int(own.num_layers * nodes * (vectors + others / shapes.tensor))


def _without_ngram_model(model: ModelConfig) -> ModelConfig:
    """Return a model without A_f, and without a stream that nothing else reads."""
    if not model.arms.makes_ngrams:
        return model
    others = ",".join(name for name in model.arms.chosen() if name != "scone")
    read = sum(model.arms.scone.stream in names for names in model.streams_read.values())
    kept = [one for one in names(model.streams) if read > 1 or not one.endswith(FREQUENT)]
    arms = dataclasses.replace(model.arms, names=others)
    return dataclasses.replace(model, arms=arms, streams=",".join(kept))


def _kept(model: ModelConfig, shapes: _Shapes, remat: str | None = None) -> tuple[float, float]:
    """Return what `_trace` says of a model, by the choices that matter to it."""
    jtok = dataclasses.replace(model.jtok, table_dtype="float32", implementation="auto")
    attention = "splash" if model.attention == "splash" else "xla"
    fields = {"remat": remat or model.remat, "attention": attention, "loss_chunk": 0, "jtok": jtok}
    data, expert = 1 + (shapes.mesh.size > 1), shapes.mesh.shape["expert"]
    return _trace(dataclasses.replace(model, **fields), data, expert)


@functools.cache
def _trace(model: ModelConfig, data: int, expert: int) -> tuple[float, float]:
    """Return bytes a token that autodiff keeps of a layer: vectors of D entries, and others."""
    mesh = AbstractMesh((data, 1, expert, 1), AXES, axis_types=AUTO)
    config, tables = Config(model=model), declared_tables(model)
    params, sequences = abstract_params(model), mesh.size * (model.num_layers + 1)
    name = SAVED if model.attention == "splash" else ""  # whose kernels need a TPU to be traced
    attend = lambda q, k, v, _: (checkpoint_name(causal(q, k, v, kind="xla"), name), None)

    def backward(backbone, tables, ids):
        parallel = parallel_reads(config, mesh)
        plans = make_plans(config, backbone, ids[None], parallel)
        first = lambda plan: plan._replace(order=jax.tree.map(lambda x: x[0], plan.order))
        mine = {key: first(plan) for key, plan in plans.items()}

        def run(backbone, grads):
            options = {"training": Rows(mine, grads), "parallel": parallel, "attend": attend}
            return bind(model, backbone | tables)(ids, **options)._replace(cached=None, health=None)

        return jax.vjp(run, backbone, zero_row_grads(config, plans, parallel))[1]

    backbone = {name: params.pop(name) for name in params.keys() - tables.keys()}
    ids = jax.ShapeDtypeStruct((sequences, PRIME), jnp.int32)
    sizes = [0, 0]
    for one in jax.tree.leaves(jax.eval_shape(backward, backbone, params, ids)):
        if one.shape[:1] == (model.num_layers,) and one.size % PRIME == 0:
            sizes[one.shape[-1] != model.model_dim] += one.size * one.dtype.itemsize
    return tuple(size / (model.num_layers * sequences * PRIME) for size in sizes)


def _layer(shapes: _Shapes) -> int:
    """Return bytes of a layer's gathered matrices, their gradients, and the backward pass."""
    own = [name for name in shapes.matrices if shapes.declared[name].owner != "scone"]
    entries = sum(shapes.entries(name, whole="D") for name in own)
    weights = entries // shapes.model.num_layers * shapes.compute
    made = _residuals(shapes, "none")
    return int(2 * weights + max(made, made / 3 + max(_scores(shapes), _mixtures(shapes))))


def _scores(shapes: _Shapes) -> float:
    """Return bytes of a layer's attention probabilities and their gradients, float32."""
    model = shapes.model
    queries = {"cudnn": 0, "splash": 0, "chunked": QUERIES}.get(model.attention, shapes.length)
    heads = model.num_heads / shapes.tensor
    return 2 * 4 * shapes.sequences * heads * min(queries, shapes.length) * shapes.length


def _mixtures(shapes: _Shapes) -> float:
    """Return bytes of rows that a device reads for its group, their sums, and gradients."""
    made, layouts = 0.0, table_layouts(shapes.config, shapes.mesh)
    for name, table in shapes.tables.items():
        parts = num_shards(shapes.mesh, layouts[name].experts + layouts[name].rows)
        heads = shapes.model.id_streams[table.stream].heads
        each = table.top_k or heads
        made += parts * table.shape[-1] * (8 * each + 10) * bool(table.layers)
    return made * shapes.tokens / shapes.tensor


def _head(shapes: _Shapes) -> int:
    """Return bytes of logits of a chunk, and of the gathered head with its gradient."""
    model = shapes.model
    vocab = model.padded_vocab / shapes.tensor
    logits = min(model.loss_chunk or math.inf, shapes.tokens) * vocab * 4
    return int(logits + vocab * model.model_dim * (shapes.compute + 4))


def _row_update(shapes: _Shapes) -> int:
    """Return bytes of one layer's rows with two moments, before and after; largest table.

    Of a table with dense updates its gradient.
    """
    sizes = [
        4 * shapes.entries(name)
        if shapes.is_dense(name)
        else 6 * (shapes.row_grads(name) // table.grads_shape[0])
        for name, table in shapes.tables.items()
    ]
    return max(sizes, default=0)
