# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Keys and values of the tokens so far; prompts of different lengths share a batch.

Prompts are padded on the right to T places, and every sequence's next token goes to the next place,
from T on. So a step writes one slice of the cache, where it lies; places of padding are never read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtok_jax.model.attention import AttentionResult, causal
from jtok_jax.model.tables import following
from jtok_jax.model.transformer import Transformer


class Cache(NamedTuple):
    """Keys and values of every layer, which places are filled, and the ids that n-grams need.

    Arrays of layers are apart, so that attention reads each where it lies.
    """

    layers: list[tuple[jax.Array, jax.Array]]  # keys and values [B, K, X, H]
    filled_BX: jax.Array  # bool
    place: jax.Array  # int32, of the next token
    lengths_B: jax.Array  # int32, tokens of each sequence
    before_BC: jax.Array  # int32, the last ids of each sequence, see tables.stream_ids


class Step(NamedTuple):
    """Float32 logits of the next token, and the cache that holds the tokens read."""

    logits_BV: jax.Array
    cache: Cache


def prefill(
    model: Transformer,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    capacity: int,
    places: dict[str, jax.Array] | None = None,
) -> Step:
    """Read right-padded prompts in one pass.

    Args:
        ids_BT: int32 in [0, V); what stands at `lengths` and after is ignored.
        lengths_B: int32, from 1 to T.
        capacity: places in the cache, at least T.
        places: of the rows that `model` has of tables, see `tables.SomeRows`.
    """
    # "splash" was asked for windows: a prompt of another length takes what fits it.
    kind = "auto" if model.config.attention == "splash" else model.config.attention
    attend = lambda q, k, v, _: AttentionResult(causal(q, k, v, kind=kind), (k, v))
    output = model(ids_BT, attend=attend, places=places)
    length = ids_BT.shape[1]
    room = ((0, 0), (0, 0), (0, capacity - length), (0, 0))
    with_room = lambda new_BTKH: jnp.pad(new_BTKH.swapaxes(1, 2), room)
    last_BD = jnp.take_along_axis(output.hidden_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    cache = Cache(
        layers=[(with_room(k), with_room(v)) for k, v in zip(*output.cached, strict=True)],
        filled_BX=jnp.arange(capacity) < lengths_B[:, None],
        place=jnp.int32(length),
        lengths_B=lengths_B,
        before_BC=following(ids_BT, lengths_B, model.config.context),
    )
    return Step(logits(model, last_BD), cache)


def decode(
    model: Transformer,
    ids_B: jax.Array,
    cache: Cache,
    places: dict[str, jax.Array] | None = None,
) -> Step:
    """Read one more token of every sequence; donated, the cache is written where it lies."""
    filled_BX = _written(cache.filled_BX, jnp.ones_like(cache.filled_BX[:, :1]), cache.place, 1)

    def attend(query_B1NH, key_B1KH, value_B1KH, layer):
        new = key_B1KH.swapaxes(1, 2), value_B1KH.swapaxes(1, 2)
        layer = [_written(old, x, cache.place, 2) for old, x in zip(layer, new, strict=True)]
        return AttentionResult(_attend(query_B1NH, *layer, filled_BX), tuple(layer))

    ids_B1 = ids_B[:, None]
    output = model(
        ids_B1,
        positions_BT=cache.lengths_B[:, None],
        attend=attend,
        cache=cache.layers,
        before_BC=cache.before_BC,
        places=places,
    )
    before_BC = jnp.concatenate([cache.before_BC, ids_B1 + 1], axis=1)[:, 1:]
    cache = Cache(output.cached, filled_BX, cache.place + 1, cache.lengths_B + 1, before_BC)
    return Step(logits(model, output.hidden_BTD[:, 0]), cache)


def _written(old: jax.Array, new: jax.Array, place: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), place, axis)


def _attend(query_B1NH, key_BKXH, value_BKXH, filled_BX) -> jax.Array:
    """Return mixed values [B, 1, N, H] of one query a sequence; scores and softmax are float32."""
    batch, heads, _, size = key_BKXH.shape
    query_BKGH = query_B1NH.reshape(batch, heads, -1, size)
    score = {"preferred_element_type": jnp.float32}
    scores_BKGX = jnp.einsum("BKGH,BKXH->BKGX", query_BKGH, key_BKXH, **score) / size**0.5
    scores_BKGX = jnp.where(filled_BX[:, None, None], scores_BKGX, -jnp.inf)
    weights_BKGX = jax.nn.softmax(scores_BKGX, axis=-1).astype(value_BKXH.dtype)
    return jnp.einsum("BKGX,BKXH->BKGH", weights_BKGX, value_BKXH).reshape(query_B1NH.shape)


def logits(model: Transformer, hidden: jax.Array) -> jax.Array:
    """Return float32 [..., V] of final-normed hidden states [..., D]."""
    head_DV = model.head_DV.astype(hidden.dtype)
    found = jnp.dot(hidden, head_DV, preferred_element_type=jnp.float32)
    return found[..., : model.config.vocab_size]
