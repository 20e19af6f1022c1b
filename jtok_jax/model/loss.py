# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Cross-entropy over a large vocabulary, a chunk of tokens at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Sums over the weighted tokens, float32."""

    nats: jax.Array  # cross-entropy
    z: jax.Array  # square of logsumexp
    weight: jax.Array  # number of tokens


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
) -> LossSums:
    """Cross-entropy and logsumexp^2, summed over tokens.

    Args:
        chunk: tokens whose float32 logits [chunk, V] exist at once, forward and backward (they are
            computed twice); 0 for all tokens at once (computed once).
    """
    hidden_RD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    rows = hidden_RD, targets_BT.reshape(-1), weights_BT.reshape(-1)
    num_rows = hidden_RD.shape[0]
    head_DV = head_DV.astype(hidden_RD.dtype)
    if chunk == 0 or num_rows <= chunk:
        return _sums(head_DV, *rows)
    missing = -num_rows % chunk
    padded = [jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) for x in rows]
    chunks = [x.reshape(-1, chunk, *x.shape[1:]) for x in padded]

    @jax.checkpoint
    def body(total, chunk_rows):
        return jax.tree.map(jnp.add, total, _sums(head_DV, *chunk_rows)), None

    zeros = LossSums(*[jnp.zeros((), jnp.float32)] * 3)
    return jax.lax.scan(body, zeros, chunks)[0]


def _sums(head_DV, hidden_RD, targets_R, weights_R) -> LossSums:
    logits_RV = jnp.dot(hidden_RD, head_DV, preferred_element_type=jnp.float32)
    lse_R = jax.nn.logsumexp(logits_RV, axis=-1)
    target_R = jnp.take_along_axis(logits_RV, targets_R[:, None], axis=-1)[:, 0]
    return LossSums(
        nats=jnp.sum(weights_R * (lse_R - target_R)),
        z=jnp.sum(weights_R * jnp.square(lse_R)),
        weight=jnp.sum(weights_R),
    )
