# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Reading tables: ids of a stream, the rows of a layer, and what a training step hands along.

    ids of the batch --stream_ids--> ids of a stream --row_plan--> plan, one a stream and step
    table, layer, ids, plan --Lookup.rows--> rows [B, T, D]; gradients arrive by unique row

Layers use rows as they like. Nothing here knows what a table is for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jtok_kernels
import numpy as np
from jtok_kernels import RowPlan, mixed

from jtok_jax.model import host_memory
from jtok_jax.model.exchange import Exchange
from jtok_jax.model.ngram_index import NgramIndex, frequent_ids
from jtok_jax.model.variables import Table
from jtok_jax.streams import IdStream

ROWS = "rows"  # the leaf of a table itself, beside those of its optimizer
GOLDEN = 0x9E3779B9  # sets the hash functions of a stream apart


class Rows(NamedTuple):
    """Plans and zeros that a training step hands a model, for gradients by unique row."""

    plans: dict[str, RowPlan]  # by `plan_key`
    grads: dict[str, jax.Array]  # zeros by table, see `zero_row_grads`; their cotangents count


class SomeRows(NamedTuple):
    """The rows of one batch, of tables that are held in host memory.

    They stand for the tables: what is looked up is the place of an id among the rows that are here.
    Of frequent n-grams the row of none is always there, so that its place is 0, as its id is.
    """

    places: dict[str, jax.Array]  # by stream; int32, as `stream_ids` gives ids
    ids: dict[str, jax.Array]  # by stream; int32 [U], ascending; the number of rows where none is
    # By table and leaf: its "rows", and what its optimizer keeps of them; [G, (M,) U (, D)].
    leaves: dict[str, dict[str, jax.Array]]


class Lookup(NamedTuple):
    """Reads the rows of one layer's table for the tokens of a batch."""

    tables: jax.Array  # the whole stack, [G, R, D] or [G, M, R, D], or words (jtok_kernels.packing)
    layer: jax.Array | int | None  # index into the stack; None: a table alone, [R, D] or [M, R, D]
    ids: jax.Array  # int32 [B, T], or [B, T, heads]
    plan: RowPlan | None = None  # of the flattened ids; for training
    row_grads: jax.Array | None = None  # [U, D] or [M, U, D]
    exchange: Exchange | None = None  # where the table lies on several devices
    ids_of_group: jax.Array | None = None  # of Exchange.gather_ids

    def rows(
        self, choice_BTK: jax.Array | None = None, weights_BTK: jax.Array | None = None
    ) -> jax.Array:
        """Return rows, or weighted sums of the chosen tables' rows, [B, T, D].

        The rows of several hash heads are added. On one device the result is float32, else it has
        the compute dtype.
        """
        if self.exchange:
            found = self.exchange.fetch(
                self.tables, self.layer, self.ids, self.ids_of_group, self.plan, self.row_grads,
                choice_BTK, weights_BTK,
            )  # fmt: skip
        else:
            flat = lambda x: None if x is None else x.reshape(-1, x.shape[-1])
            found = jtok_kernels.mix_rows(
                self.tables, self.ids.reshape(-1), flat(choice_BTK), flat(weights_BTK),
                layer=self.layer, plan=self.plan, row_grads=self.row_grads,
            ).reshape(*self.ids.shape, -1)  # fmt: skip
        return found.sum(axis=2) if self.ids.ndim == 3 else found


class Reader(NamedTuple):
    """Makes the lookups of one forward pass."""

    tables: dict[str, Table]
    ids: dict[str, jax.Array]  # by stream
    training: Rows | None
    exchanges: dict[str, Exchange]  # by table; {} on one device
    ids_of_group: dict[str, jax.Array]  # by `plan_key`

    def lookup(self, name: str, layer: jax.Array | int, row_grads: jax.Array | None) -> Lookup:
        """Return the lookup of one table; `row_grads` are those of the layer.

        Of a table in host memory the layer alone is moved to the device, where row gradients are.
        """
        table, exchange = self.tables[name], self.exchanges.get(name)
        key = plan_key(table.stream, exchange)
        plan = self.training.plans[key] if self.training else None
        ids, of_group = self.ids[table.stream], self.ids_of_group.get(key)
        stack = table[...]
        if host_memory.is_on_host(stack):
            stack, layer = host_memory.layer_of(stack, layer), 0
        return Lookup(stack, layer, ids, plan, row_grads, exchange, of_group)

    def of_layer(
        self, stacks: dict[str, jax.Array], row_grads: dict[str, jax.Array]
    ) -> dict[str, Lookup]:
        """Return the lookups of one layer by table.

        Args:
            stacks: the layer's index in the stack of each table.
            row_grads: those of the layer by table; {}: not in training.
        """
        return {name: self.lookup(name, stacks[name], row_grads.get(name)) for name in stacks}

    def at_input(self, name: str) -> Lookup:
        """Return the lookup of a table that no layer has."""
        grads = host_memory.to_device(self.training.grads[name])[0] if self.training else None
        return self.lookup(name, 0, grads)

    @property
    def in_layers(self) -> dict[str, Table]:
        return {name: table for name, table in self.tables.items() if table.layers}


def make_reader(
    tables: dict[str, Table],
    streams: dict[str, IdStream],
    ids_BT: jax.Array,
    before_BC: jax.Array | None,
    training: Rows | None,
    exchanges: dict[str, Exchange],
    places: dict[str, jax.Array] | None,
    indices: dict[str, NgramIndex],
) -> Reader:
    """Return the reader of a batch; ids of every stream that a table reads are made once.

    places: what takes the place of these ids, see `SomeRows`.
    indices: of streams of frequent n-grams.
    """
    ids, of_group = dict(places or {}), {}
    for name, table in tables.items():
        if table.stream not in ids:
            stream = streams[table.stream]
            index = indices.get(stream.name)
            ids[stream.name] = stream_ids(stream, ids_BT, before_BC, index=index)
        exchange = exchanges.get(name)
        key = plan_key(table.stream, exchange)
        if exchange and key not in of_group:
            of_group[key] = exchange.gather_ids(ids[table.stream])
    return Reader(tables, ids, training, exchanges, of_group)


def stream_ids(
    stream: IdStream,
    ids_BT: jax.Array,
    before_BC: jax.Array | None = None,
    *,
    index: NgramIndex | None = None,
    xp=jnp,
) -> jax.Array:
    """Return int32 ids [B, T], or [B, T, heads], in [0, stream.num_rows).

    An n-gram's id is a hash of the last n token ids; before a sequence's first token there is none.
    That of frequent n-grams is 1 + the row of the longest, 0 where there is none.

    Args:
        before_BC: int32, as many ids before the first as the longest n-gram reads, each plus 1,
            and 0 where there is none. None: nothing comes before.
        index: of frequent n-grams.
        xp: the module that computes hashes, `jax.numpy` or, on the host, `numpy`.
    """
    if stream.order == 1:
        return ids_BT
    if stream.frequent:
        return frequent_ids(index, ids_BT, before_BC, stream)
    length, reach = ids_BT.shape[1], stream.order - 1
    ids = ids_BT.astype(np.uint32) + 1
    if before_BC is None:
        ids = xp.pad(ids, ((0, 0), (reach, 0)))
    else:
        ids = xp.concatenate([before_BC[:, -reach:].astype(np.uint32), ids], axis=1)
    hashed, parts = xp.zeros_like(ids_BT, np.uint32), _within_documents(stream, ids, length, xp)
    for part in parts:
        hashed = mixed(part ^ hashed)
    rows = np.uint32(stream.rows)
    if stream.heads == 1:
        return (hashed % rows).astype(np.int32)
    heads = xp.arange(stream.heads, dtype=np.uint32)
    by_head = mixed(hashed[..., None] ^ (heads * np.uint32(GOLDEN))) % rows
    return (by_head + heads * rows).astype(np.int32)


def _within_documents(stream: IdStream, ids: jax.Array, length: int, xp) -> list[jax.Array]:
    """Return the ids that an n-gram reads, the oldest first; 0 for those of another document."""
    parts = [ids[:, first : first + length] for first in range(stream.order)]
    if stream.document_id < 0:
        return parts
    own, found = xp.ones_like(parts[0], bool), []
    for part in reversed(parts):
        found.append(xp.where(own, part, xp.zeros_like(part)))
        own = own & (part != stream.document_id + 1)
    return found[::-1]


def following(ids_BT: jax.Array, lengths_B: jax.Array, context: int) -> jax.Array:
    """Return `before_BC` of the token that follows each right-padded sequence."""
    places = lengths_B[:, None] - context + jnp.arange(context)
    ids = jnp.take_along_axis(ids_BT, jnp.maximum(places, 0), axis=1) + 1
    return jnp.where(places >= 0, ids, 0).astype(jnp.int32)


def plan_key(stream: str, exchange: Exchange | None) -> str:
    """Return the key of a plan: tables of one stream share it where they are split alike."""
    if exchange is None:
        return stream
    return f"{stream}: {exchange.layout.columns} {exchange.layout.experts} {exchange.layout.rows}"
