# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

Gradients are computed with the loss, chunk by chunk: of logits and their gradient one chunk exists.
On several devices each has the chunks of its own sequences, for its part of V where that is split.
Once a microbatch the head is gathered along D. Its gradient is a float32 sum over the chunks, which
is rounded to the compute dtype and summed over devices once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtok_jax.mesh import BATCH, RULES, num_shards


class LossSums(NamedTuple):
    """Sums over the weighted tokens, float32."""

    nats: jax.Array  # cross-entropy
    z: jax.Array  # square of logsumexp
    weight: jax.Array  # number of tokens


class _Fixed(NamedTuple):
    vocab_size: int
    padded_vocab: int  # columns of the head
    positions: int  # of every sequence, in a chunk
    z_loss: float
    mesh: Mesh | None


class _Grads(NamedTuple):
    """Gradients of the loss."""

    hidden_BTD: jax.Array
    head_DV: jax.Array


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    z_loss: float = 0.0,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, LossSums]:
    """Return the mean of cross-entropy + `z_loss` * logsumexp^2 over weighted tokens, and sums.

    Only the mean has derivatives, first ones in reverse mode, by hidden states and head; to the
    sums nothing flows back. All weights zero: NaN.

    Args:
        targets_BT: int32 in [0, vocab_size); not checked here.
        vocab_size: columns of the head that take part, from the first.
        chunk: tokens of a device whose float32 logits [chunk, V] exist at once, at least one
            position of every sequence; 0 for all tokens at once.
        z_loss: a Python number.
        mesh: of the devices that the sequences are split over, where there are several.
    """
    batch, length = targets_BT.shape
    # Chunks are cut along T: every device keeps its own sequences in each of them.
    sequences = batch // num_shards(mesh, BATCH) if mesh else batch
    positions = min(length, max(1, chunk // sequences)) if chunk else length
    fixed = _Fixed(vocab_size, head_DV.shape[1], positions, z_loss, mesh)
    weights_BT = weights_BT.astype(jnp.float32)
    return _cross_entropy(fixed, hidden_BTD, head_DV, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(fixed: _Fixed, *arrays):
    sums, _ = _on_devices(fixed, *arrays, with_grads=False)
    return _mean(fixed, sums), sums


def _forward(fixed: _Fixed, *arrays):
    sums, grads = _on_devices(fixed, *arrays, with_grads=True)
    return (_mean(fixed, sums), sums), grads


def _backward(fixed: _Fixed, grads: _Grads, of_results):
    of_mean, _ = of_results
    return *[(of_mean * grad).astype(grad.dtype) for grad in grads], None, None


_cross_entropy.defvjp(_forward, _backward)


def _mean(fixed: _Fixed, sums: LossSums) -> jax.Array:
    return (sums.nats + fixed.z_loss * sums.z) / sums.weight


def _on_devices(
    fixed: _Fixed, hidden_BTD, head_DV, targets_BT, weights_BT, *, with_grads: bool
) -> tuple[LossSums, _Grads | None]:
    arrays = hidden_BTD, head_DV, targets_BT, weights_BT, weights_BT.sum()
    if fixed.mesh is None:
        return _all_chunks(fixed, *arrays, with_grads=with_grads)
    of_D, of_V = RULES["D"], RULES["V"]

    def here(hidden_BTD, part_DV, *others):
        dtype = hidden_BTD.dtype
        head_DV = jax.lax.all_gather(part_DV.astype(dtype), of_D, axis=0, tiled=True)
        sums, grads = _all_chunks(fixed, hidden_BTD, head_DV, *others, with_grads=with_grads)
        sums = jax.lax.psum(sums, BATCH)
        if grads is None:
            return sums, None
        of_head = jax.lax.psum_scatter(grads.head_DV, of_D, scatter_dimension=0, tiled=True)
        of_head = jax.lax.psum(of_head, tuple(name for name in BATCH if name not in of_D))
        of_hidden = jax.lax.psum(grads.hidden_BTD, of_V)
        return sums, _Grads(of_hidden, of_head.astype(part_DV.dtype))

    split, part = P(BATCH), P(of_D, of_V)
    specs = {
        "in_specs": (split, part, split, split, P()),
        "out_specs": (P(), _Grads(split, part) if with_grads else None),
    }
    return jax.shard_map(here, mesh=fixed.mesh, **specs, check_vma=False)(*arrays)


def _all_chunks(
    fixed: _Fixed, hidden_BTD, head_DV, targets_BT, weights_BT, weight, *, with_grads: bool
) -> tuple[LossSums, _Grads | None]:
    """Return sums over these sequences; gradients have the dtype of what they are of."""
    arrays, narrow_DV = (hidden_BTD, targets_BT, weights_BT), head_DV.astype(hidden_BTD.dtype)
    batch, length, dim = hidden_BTD.shape
    one = functools.partial(_chunk, fixed, narrow_DV, weight, with_grads=with_grads)
    if fixed.positions == length:
        sums, grads = one(*arrays)
        return sums, grads and grads._replace(head_DV=grads.head_DV.astype(head_DV.dtype))
    missing = -length % fixed.positions
    padded = [jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]
    chunks = [x.reshape(batch, -1, fixed.positions, *x.shape[2:]).swapaxes(0, 1) for x in padded]

    def body(total, arrays):
        sums, grads = one(*arrays)
        if grads is None:
            return jax.tree.map(jnp.add, total, (sums, None)), None
        return jax.tree.map(jnp.add, total, (sums, grads.head_DV)), grads.hidden_BTD

    zeros = LossSums(*[jnp.zeros((), jnp.float32)] * 3)
    of_head = jnp.zeros(head_DV.shape, jnp.float32) if with_grads else None
    (sums, of_head), of_hidden = jax.lax.scan(body, (zeros, of_head), chunks)
    if not with_grads:
        return sums, None
    of_hidden = of_hidden.swapaxes(0, 1).reshape(batch, -1, dim)[:, :length]
    return sums, _Grads(of_hidden, of_head.astype(head_DV.dtype))


def _chunk(
    fixed: _Fixed, head_DV, weight, hidden_BTD, targets_BT, weights_BT, *, with_grads: bool
) -> tuple[LossSums, _Grads | None]:
    """Return sums, and gradients of the mean over `weight` tokens; that of the head is float32."""
    # Two axes, not three: XLA on the CPU copies three-axis logits.
    hidden_RD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    targets_R, weights_R = targets_BT.reshape(-1), weights_BT.reshape(-1)
    first, over_parts = _part(fixed, head_DV)
    column_V = first + jnp.arange(head_DV.shape[1])
    logits_RV = jnp.dot(hidden_RD, head_DV, preferred_element_type=jnp.float32)
    if fixed.vocab_size < fixed.padded_vocab:  # masked: a cut would not divide over devices
        logits_RV = jnp.where(column_V < fixed.vocab_size, logits_RV, -jnp.inf)
    max_R = over_parts(jax.lax.pmax, logits_RV.max(axis=-1))
    sum_R = over_parts(jax.lax.psum, jnp.exp(logits_RV - max_R[:, None]).sum(axis=-1))
    lse_R = max_R + jnp.log(sum_R)
    # From the head's columns: the logits are not read again.
    is_here_R = (targets_R >= first) & (targets_R < first + head_DV.shape[1])
    of_target_RD = head_DV.T[jnp.where(is_here_R, targets_R - first, 0)]
    target_R = jnp.einsum("RD,RD->R", hidden_RD, of_target_RD, preferred_element_type=jnp.float32)
    target_R = over_parts(jax.lax.psum, jnp.where(is_here_R, target_R, 0.0))
    sums = LossSums(
        nats=jnp.sum(weights_R * (lse_R - target_R)),
        z=jnp.sum(weights_R * jnp.square(lse_R)),
        weight=jnp.sum(weights_R),
    )
    if not with_grads:
        return sums, None
    share_R = weights_R / weight
    of_lse_R = share_R * (1 + 2 * fixed.z_loss * lse_R)
    is_target_RV = column_V == targets_R[:, None]
    of_logits_RV = jnp.exp(logits_RV - lse_R[:, None]) * of_lse_R[:, None]
    of_logits_RV = of_logits_RV - jnp.where(is_target_RV, share_R[:, None], 0.0)
    # Matmuls take the compute dtype, and add up in float32.
    of_logits_RV = of_logits_RV.astype(head_DV.dtype)
    of_hidden_RD = jnp.dot(of_logits_RV, head_DV.T)
    of_head_DV = jnp.dot(hidden_RD.T, of_logits_RV, preferred_element_type=jnp.float32)
    return sums, _Grads(of_hidden_RD.reshape(hidden_BTD.shape), of_head_DV)


def _part(fixed: _Fixed, head_DV: jax.Array):
    """Return the first column of this part of the head, and how a reduction goes over all parts."""
    if fixed.mesh is None:
        return 0, lambda reduce, x: x
    axes = RULES["V"]
    return jax.lax.axis_index(axes) * head_DV.shape[1], lambda reduce, x: reduce(x, axes)
