# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Keys and values of the tokens so far; prompts of different lengths share a batch.

Prompts are padded on the right. A sequence's position p is written at place p of the cache, so a
generated token overwrites the padding, and places from the sequence's length on are never read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtok_jax.model.attention import AttentionResult, causal
from jtok_jax.model.tables import following
from jtok_jax.model.transformer import Transformer


class Cache(NamedTuple):
    """Keys and values of all layers, how many places are filled, and the ids that n-grams need."""

    key_LBXKH: jax.Array
    value_LBXKH: jax.Array
    lengths_B: jax.Array  # int32
    before_BC: jax.Array  # int32, the last ids of each sequence, see tables.stream_ids


class Step(NamedTuple):
    """Float32 logits of the next token, and the cache that holds the tokens read."""

    logits_BV: jax.Array
    cache: Cache


def prefill(model: Transformer, ids_BT: jax.Array, lengths_B: jax.Array, *, capacity: int) -> Step:
    """Read right-padded prompts in one pass.

    Args:
        ids_BT: int32 in [0, V); what stands at `lengths` and after is ignored.
        lengths_B: int32, from 1 to T.
        capacity: places in the cache, at least T.
    """
    # "splash" was asked for windows: a prompt of another length takes what fits it.
    kind = "auto" if model.config.attention == "splash" else model.config.attention
    attend = lambda q, k, v, _: AttentionResult(causal(q, k, v, kind=kind), (k, v))
    output = model(ids_BT, attend=attend)
    room = ((0, 0), (0, 0), (0, capacity - ids_BT.shape[1]), (0, 0), (0, 0))
    key, value = [jnp.pad(new, room) for new in output.cached]
    last_BD = jnp.take_along_axis(output.hidden_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    before_BC = following(ids_BT, lengths_B, model.config.context)
    return Step(_logits(model, last_BD), Cache(key, value, lengths_B, before_BC))


def decode(model: Transformer, ids_B: jax.Array, cache: Cache) -> Step:
    """Read one more token of every sequence."""
    places = jnp.arange(cache.key_LBXKH.shape[2])
    positions_B1 = cache.lengths_B[:, None]
    # Cached places before the token, then the token itself.
    mask_BX = jnp.pad(places < positions_B1, ((0, 0), (0, 1)), constant_values=True)

    def attend(query, key, value, cached):
        keys = jnp.concatenate([cached[0], key], axis=1)
        values = jnp.concatenate([cached[1], value], axis=1)
        mixed = jax.nn.dot_product_attention(
            query, keys, values, mask=mask_BX[:, None, None], implementation="xla"
        )
        return AttentionResult(mixed, (key, value))

    ids_B1 = ids_B[:, None]
    output = model(
        ids_B1,
        positions_BT=positions_B1,
        attend=attend,
        cache=(cache.key_LBXKH, cache.value_LBXKH),
        before_BC=cache.before_BC,
    )
    rows = jnp.arange(ids_B.shape[0])
    key, value = [
        old.at[:, rows, cache.lengths_B].set(new[:, :, 0])
        for old, new in zip(cache[:2], output.cached, strict=True)
    ]
    before_BC = jnp.concatenate([cache.before_BC, ids_B1 + 1], axis=1)[:, 1:]
    cache = Cache(key, value, cache.lengths_B + 1, before_BC)
    return Step(_logits(model, output.hidden_BTD[:, 0]), cache)


def _logits(model: Transformer, hidden_BD: jax.Array) -> jax.Array:
    head_DV = model.head_DV.astype(hidden_BD.dtype)
    logits_BV = jnp.dot(hidden_BD, head_DV, preferred_element_type=jnp.float32)
    return logits_BV[:, : model.config.vocab_size]
