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
            computed twice), at least one place of every sequence; 0 for all tokens at once.
    """
    head_DV = head_DV.astype(hidden_BTD.dtype)
    arrays = hidden_BTD, targets_BT, weights_BT
    batch, length = targets_BT.shape
    if chunk == 0 or batch * length <= chunk:
        return _sums(head_DV, *arrays)
    # Chunks are cut along T: every device keeps its own sequences in each of them.
    places = max(1, chunk // batch)
    missing = -length % places
    padded = [jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]
    chunks = [x.reshape(batch, -1, places, *x.shape[2:]).swapaxes(0, 1) for x in padded]

    @jax.checkpoint
    def body(total, chunk_arrays):
        return jax.tree.map(jnp.add, total, _sums(head_DV, *chunk_arrays)), None

    zeros = LossSums(*[jnp.zeros((), jnp.float32)] * 3)
    return jax.lax.scan(body, zeros, chunks)[0]


def _sums(head_DV, hidden_BTD, targets_BT, weights_BT) -> LossSums:
    logits_BTV = jnp.dot(hidden_BTD, head_DV, preferred_element_type=jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # The target's logit from its column of the head: picking it out of the logits would scatter
    # into [B, T, V] in the backward pass.
    target_BT = jnp.einsum(
        "BTD,BTD->BT", hidden_BTD, head_DV.T[targets_BT], preferred_element_type=jnp.float32
    )
    return LossSums(
        nats=jnp.sum(weights_BT * (lse_BT - target_BT)),
        z=jnp.sum(weights_BT * jnp.square(lse_BT)),
        weight=jnp.sum(weights_BT),
    )
