# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JAX's splash attention for TPUs: causal, grouped queries, no array of T x T.

The kernels are the library's own (jax.experimental.pallas.ops.tpu.splash_attention). This file
says where they fit, scales the queries, and places one kernel on every device of a mesh.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from jtok_jax.mesh import BATCH

SAVED = "splash attention"  # kept by remat "dots": the output and the logarithm of its sums
LANES = library.NUM_LANES
BLOCKS = (512, 256, 128)  # queries and keys of a block: the largest that divides T
MAX_HEAD = 256  # the largest head size that has been compiled with such blocks
_HEADS = PartitionSpec(BATCH, None, "tensor")  # of [B, T, N, H] in shard_map


def obstacle(dtype, head_size: int, length: int) -> str | None:
    """Return why the kernels cannot take such arrays, or None."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the dtype is {jnp.dtype(dtype)}; splash attention takes bfloat16 and float32"
    if head_size > MAX_HEAD:
        return f"the head size is {head_size}; splash attention is for at most {MAX_HEAD} here"
    if length % LANES:
        return f"a sequence has {length} tokens; splash attention takes multiples of {LANES}"
    return None


def splash(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return what every token reads of itself and of those before it, [B, T, N, H].

    Args:
        segment_ids_BT: int32; a token reads only those with its own id. None: one segment.
        mesh: several devices, with the batch split over `BATCH` and the heads over "tensor".
        interpret: simulate the kernels, for tests on a CPU.
    """
    local = functools.partial(_local, interpret=interpret)
    if mesh is None:
        return local(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT)
    segments = None if segment_ids_BT is None else PartitionSpec(BATCH)
    specs = {"in_specs": (_HEADS, _HEADS, _HEADS, segments), "out_specs": _HEADS}
    # The kernels declare no variation over mesh axes of what they return.
    run = jax.shard_map(local, mesh=mesh, **specs, check_vma=False)
    return run(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT)


def _local(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT, *, interpret: bool) -> jax.Array:
    """Run on one device; keys and values are not repeated for the heads that share them."""
    _, length, heads, size = query_BTNH.shape
    scaled = query_BTNH.astype(jnp.float32) * size**-0.5  # which the kernels leave out
    kernel = _kernel(heads, length, interpret)

    def sequence(query_NTH, key_KTH, value_KTH, segments_T):
        segments = None if segments_T is None else library.SegmentIds(segments_T, segments_T)
        return kernel(query_NTH, key_KTH, value_KTH, segments)

    by_head = [x.swapaxes(1, 2) for x in (scaled.astype(query_BTNH.dtype), key_BTKH, value_BTKH)]
    return jax.vmap(sequence)(*by_head, segment_ids_BT).swapaxes(1, 2)


def _kernel(heads: int, length: int, interpret: bool) -> library.SplashAttentionKernel:
    block = next(size for size in BLOCKS if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return library.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=library.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
