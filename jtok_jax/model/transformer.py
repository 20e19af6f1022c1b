# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The decoder: embedding, scanned blocks, final norm."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jtok_jax.mesh import split_batch, split_columns
from jtok_jax.model import host_memory
from jtok_jax.model.arms import arm_tables, table_name
from jtok_jax.model.attention import AttentionResult, causal
from jtok_jax.model.block import TABLES, moments, over_layers, remat, stacked_blocks
from jtok_jax.model.exchange import Exchange
from jtok_jax.model.layers import (
    layer_norm,
    rms_norm,
    rotation,
)
from jtok_jax.model.ngram_index import NgramIndex, NgramStreams
from jtok_jax.model.scone import NgramModel, embed_ngrams
from jtok_jax.model.tables import Reader, Rows, make_reader
from jtok_jax.model.variables import Embedding, Table, Vector, normal, ones, owned
from jtok_jax.model_config import ModelConfig


class Output(NamedTuple):
    """Result of the blocks.

    `cached` is what `attend` returned for a cache: stacked by layer, or, where `cache` was given, a
    list by layer. Balance terms are summed over layers.
    """

    hidden_BTD: jax.Array
    cached: object
    moe_balance: jax.Array
    jtok_balance: jax.Array
    health: dict[str, jax.Array]
    ngrams: dict[str, jax.Array]  # what SCONE made of the batch, see `scone.embed_ngrams`


class Parallel(NamedTuple):
    """Several devices, and how each table on them is read."""

    exchanges: dict[str, Exchange]
    mesh: Mesh


class Transformer(nnx.Module):
    """All parameters of a model; blocks are stacked along a leading layer axis."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, rows: Mapping[str, jax.Array] | None = None
    ):
        """Draw the initial values; `rows`: of tables only these, int32 [U] by stream."""
        rows = rows or {}
        dim, vocab, dtype = config.model_dim, config.vocab_size, config.param_dtype
        pad = config.padded_vocab - vocab
        std = config.embed_std
        tied = {"kind": Embedding, "share": (int(config.head == "tied"), 1)}
        self.embed = normal(rngs, vocab, dim, axes="VD", std=std, dtype=dtype, pad=(pad, 0), **tied)
        self.blocks = stacked_blocks(config, rngs)
        self.final_norm = ones(dim, "D")
        if config.block_norm == "weightless_layer":
            self.final_bias = Vector(jnp.zeros(dim, jnp.float32), "D")
        if config.head == "untied":
            std = config.init_std
            self.head = normal(rngs, dim, vocab, axes="DV", std=std, dtype=dtype, pad=(0, pad))
        if config.frequent_streams:
            self.ngrams = NgramStreams(config.frequent_streams)
        if config.arms.makes_ngrams:
            self.scone = owned(NgramModel(config, rngs=rngs), "scone")
        if config.tables_shape:
            self.tables = _jtok_tables(config, rngs, rows)
        if config.arms.table_streams:
            self.arms = arm_tables(config, rngs=rngs, rows=rows)
        self.config = config

    @property
    def named_tables(self) -> dict[str, Table]:
        """Return every table by its path, the order of which does not change."""
        found = nnx.to_flat_state(nnx.state(self, Table))
        return {"/".join(path): table for path, table in found}

    @property
    def indices(self) -> dict[str, NgramIndex]:
        """Return what frequent n-grams are found in, by stream."""
        return self.ngrams.indices if self.config.frequent_streams else {}

    @property
    def head_DV(self) -> jax.Array:
        return self.embed[...].T if self.config.head == "tied" else self.head[...]

    def __call__(
        self,
        ids_BT: jax.Array,
        *,
        training: Rows | None = None,
        before_BC: jax.Array | None = None,
        places: dict[str, jax.Array] | None = None,
        positions_BT: jax.Array | None = None,
        attend: Callable[..., AttentionResult] | None = None,
        cache: Sequence | None = None,
        parallel: Parallel | None = None,
        with_health: bool = False,
    ) -> Output:
        """Return the final-normed hidden states of `ids`, and what else `Output` holds.

        Args:
            ids_BT: int32 in [0, V); not checked here.
            training: for gradients of tables by unique row. None: tables get dense gradients.
            before_BC, places: of `tables.stream_ids` and `tables.SomeRows`.
            positions_BT: int32; default 0, 1, ... in every sequence.
            attend: (query, key, value, cache of the layer) -> AttentionResult; default causal.
            cache: of every layer what `attend` is handed, layers being traced one by one.
            parallel: several devices; `training` is that of its exchanges.
            with_health: also measure the stream, the router and the rows of every layer.
        """
        config = self.config
        segments_BT, places_BT = _documents(ids_BT, -1 if attend else config.document_id)
        rope = rotation(places_BT if positions_BT is None else positions_BT, config)
        exchanges, mesh = parallel or ({}, None)
        attend = attend or _attend_causally(config, mesh, segments_BT)
        split = lambda x, how: x if mesh is None else _split(x, how(mesh))
        known = ids_BT, before_BC, training, exchanges, places, self.indices
        reader = make_reader(self.named_tables, config.id_streams, *known)
        in_layers = reader.in_layers
        partly = TABLES in in_layers and min(in_layers[TABLES].layers) < 0
        graph, params = nnx.split(self.blocks)
        options = {"rope": rope, "mesh": mesh, "with_health": with_health}

        def body(h_BTD, layer):
            params, stacks, row_grads, cache = layer
            row_grads = jax.tree.map(host_memory.to_device, row_grads)
            mine = lambda query, key, value: attend(query, key, value, cache)
            run = functools.partial(nnx.merge(graph, params), h_BTD, attend=mine, **options)
            with_all = lambda: run(lookups=reader.of_layer(stacks, row_grads))
            if not partly:
                out_BTD, cached, aux = with_all()
            else:  # the index is negative in layers without JTok's tables
                others = {name: index for name, index in stacks.items() if name != TABLES}
                without = lambda: run(lookups=reader.of_layer(others, row_grads))
                out_BTD, cached, aux = _either(stacks[TABLES] >= 0, with_all, without)
            return split(out_BTD, split_batch), (cached, aux)

        h_BTD, ngrams = self._input(ids_BT, before_BC, reader, mesh)
        stacks = {name: np.array(table.layers, np.int32) for name, table in in_layers.items()}
        row_grads = {name: training.grads[name] for name in in_layers} if training else {}
        layers, body = (params, stacks, row_grads, cache), remat(body, config.remat)
        h_BTD, (cached, aux) = over_layers(body, h_BTD, layers)
        health = _with_stds(aux.health, moments(h_BTD)) if with_health else {}
        balances = aux.moe_balance.sum(), aux.jtok_balance.sum()
        return Output(self._final_norm(h_BTD), cached, *balances, health, ngrams)

    def _final_norm(self, h_BTD: jax.Array) -> jax.Array:
        """Return the last norm of `h`, which has a weight whatever those of blocks have."""
        weight_D, eps = self.final_norm[...], self.config.norm_eps
        if self.config.block_norm == "weightless_layer":
            return layer_norm(h_BTD, weight_D, self.final_bias[...], eps=eps)
        return rms_norm(h_BTD, weight_D, eps=eps)

    def _input(self, ids_BT, before_BC, reader: Reader, mesh: Mesh | None):
        """Return what the blocks read, [B, T, D], and `Output.ngrams`.

        That is the embedding of `ids`, or SCONE's of an n-gram; rows of tables at the input are
        added.
        """
        config, dtype, ngrams = self.config, self.config.compute_dtype, {}
        split = lambda x, how: x if mesh is None else _split(x, how(mesh))
        embed = lambda ids: split(self.embed[ids].astype(dtype), split_columns)
        h_BTD, at_input = embed(ids_BT), reader.tables.keys() - reader.in_layers.keys()
        if config.arms.makes_ngrams:
            stream = config.id_streams[config.arms.scone.stream]
            h_BTD, ngrams = embed_ngrams(
                self.scone, ids_BT, before_BC, self.indices[stream.name], stream, embed, h_BTD,
                room=config.arms.scone.room, training=reader.training is not None, mesh=mesh,
            )  # fmt: skip
        of_ngrams = table_name("scone", config.arms.scone.stream)
        if of_ngrams in at_input:
            rows_BTD = reader.at_input(of_ngrams).rows().astype(dtype)
            is_frequent = reader.ids[config.arms.scone.stream] > 0
            h_BTD = jnp.where(is_frequent[..., None], rows_BTD, h_BTD)
        for name in sorted(at_input - {of_ngrams}):
            h_BTD = h_BTD + reader.at_input(name).rows().astype(dtype)
        return split(h_BTD, split_batch), ngrams


def _jtok_tables(config: ModelConfig, rngs: nnx.Rngs, rows: Mapping[str, jax.Array]) -> Table:
    jtok, count = config.jtok, config.id_streams[config.jtok.stream].num_rows
    pad = config.padded_vocab - config.vocab_size if jtok.stream == "token" else 0
    *stack, _, dim = config.tables_shape
    return normal(
        rngs, *stack, count - pad, dim, axes="GXRC" if len(stack) == 2 else "GRC", pad=(pad, 0),
        std=jtok.table_init_std, dtype=jtok.table_dtype, kind=Table, stream=jtok.stream,
        layers=jtok.table_of_layer(config.num_layers), owner="jtok",
        implementation=jtok.implementation, top_k=jtok.top_k if len(stack) == 2 else 0,
        rows=rows.get(jtok.stream),
    )  # fmt: skip


def _documents(ids_BT: jax.Array, document_id: int) -> tuple[jax.Array | None, jax.Array]:
    """Return the number of each token's document, and its place there, int32; -1: all are one."""
    places = jnp.arange(ids_BT.shape[1])[None]
    if document_id < 0:
        return None, places
    begins = ids_BT == document_id
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    return jnp.cumsum(begins, axis=1), places - first


def _attend_causally(
    config: ModelConfig, mesh: Mesh | None, segments_BT: jax.Array | None
) -> Callable[..., AttentionResult]:
    """Return an `attend` that keeps nothing of a layer."""
    attend = functools.partial(causal, kind=config.attention, mesh=mesh, segment_ids_BT=segments_BT)
    return lambda query, key, value, _: AttentionResult(attend(query, key, value), None)


def _split(x: jax.Array, how: NamedSharding) -> jax.Array:
    """Return `x` split as told: the partitioner may gather the batch to split D instead.

    It does so here or in gradients. From columns to sequences and back is one all-to-all.
    """
    return jax.lax.with_sharding_constraint(x, how)


def _with_stds(health: dict[str, jax.Array], final_B2: jax.Array) -> dict[str, jax.Array]:
    """Return `health` with deviations of the stream for its moments, and that after all layers."""

    def std(moments_B2):
        mean, square = jnp.moveaxis(moments_B2.mean(axis=-2), -1, 0)
        return jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0))

    return health | {"hidden_std": std(health["hidden_std"]), "final_std": std(final_B2)}


def _either(condition: jax.Array, with_tables: Callable, without: Callable):
    """Return what a layer returns: with tables if the condition holds, else without.

    Without them some entries of its health are missing; they are NaN.
    """
    _, _, aux = jax.eval_shape(with_tables)
    fill = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), aux.health)

    def filled():
        h, cached, aux = without()
        return h, cached, aux._replace(health=fill | aux.health)

    return jax.lax.cond(condition, with_tables, filled)
