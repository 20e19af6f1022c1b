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
    vocab_size: int,
    chunk: int,
) -> LossSums:
    """Cross-entropy and logsumexp^2, summed over tokens.

    Args:
        vocab_size: columns of the head that take part, from the first.
        chunk: tokens whose float32 logits [chunk, V] exist at once, forward and backward (they are
            computed twice), at least one place of every sequence; 0 for all tokens at once.
    """
    head_DV = head_DV.astype(hidden_BTD.dtype)
    arrays = hidden_BTD, targets_BT, weights_BT
    batch, length = targets_BT.shape
    if chunk == 0 or batch * length <= chunk:
        return _sums(head_DV, vocab_size, *arrays)
    # Chunks are cut along T: every device keeps its own sequences in each of them.
    places = max(1, chunk // batch)
    missing = -length % places
    padded = [jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]
    chunks = [x.reshape(batch, -1, places, *x.shape[2:]).swapaxes(0, 1) for x in padded]

    @jax.checkpoint
    def body(total, chunk_arrays):
        return jax.tree.map(jnp.add, total, _sums(head_DV, vocab_size, *chunk_arrays)), None

    zeros = LossSums(*[jnp.zeros((), jnp.float32)] * 3)
    return jax.lax.scan(body, zeros, chunks)[0]


def _sums(head_DV, vocab_size: int, hidden_BTD, targets_BT, weights_BT) -> LossSums:
    # Two axes, not three: XLA on the CPU copies three-axis logits in the backward pass.
    hidden_RD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    targets_R, weights_R = targets_BT.reshape(-1), weights_BT.reshape(-1)
    logits_RV = jnp.dot(hidden_RD, head_DV, preferred_element_type=jnp.float32)
    if vocab_size < head_DV.shape[1]:  # masked, not cut out: a cut would not divide over devices
        logits_RV = jnp.where(jnp.arange(head_DV.shape[1]) < vocab_size, logits_RV, -jnp.inf)
    # From the head's columns, as V may be split over devices and the logits are not read again.
    target_R = jnp.einsum(
        "RD,RD->R", hidden_RD, head_DV.T[targets_R], preferred_element_type=jnp.float32
    )
    lse_R, target_R = _lse_and_target(logits_RV, target_R, targets_R)
    return LossSums(
        nats=jnp.sum(weights_R * (lse_R - target_R)),
        z=jnp.sum(weights_R * jnp.square(lse_R)),
        weight=jnp.sum(weights_R),
    )


@jax.custom_vjp
def _lse_and_target(logits_RV, target_R, targets_R):
    """logsumexp [R], and the logit of the target [R] as it is given.

    Both derivatives go to the logits, as one array [R, V]. That of a gather from the head would be
    a scatter in the compute dtype: bfloat16 sums lose a third of the gradient of a frequent token.
    """
    return jax.nn.logsumexp(logits_RV, axis=-1), target_R


def _lse_and_target_fwd(logits_RV, target_R, targets_R):
    lse_R, target_R = _lse_and_target(logits_RV, target_R, targets_R)
    return (lse_R, target_R), (logits_RV, lse_R, targets_R)


def _lse_and_target_bwd(kept, grads):
    (logits_RV, lse_R, targets_R), (d_lse_R, d_target_R) = kept, grads
    softmax_RV = jnp.exp(logits_RV - lse_R[:, None])
    is_target_RV = jnp.arange(logits_RV.shape[1]) == targets_R[:, None]
    d_RV = softmax_RV * d_lse_R[:, None] + jnp.where(is_target_RV, d_target_R[:, None], 0.0)
    return d_RV, None, None


_lse_and_target.defvjp(_lse_and_target_fwd, _lse_and_target_bwd)
