# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Grouped-query causal attention with rotary positions."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jtok_jax.errors import ConfigError
from jtok_jax.model.layers import Rotation, normal, residual_std, rms_norm, rotate
from jtok_jax.model_config import ModelConfig


class Attended(NamedTuple):
    """Mixed values [B, T, N, H], and whatever an inference cache wants kept of this layer."""

    mixed: jax.Array
    kept: object


QUERIES = 512  # of a chunk, kind "chunked"

# (query_BTNH, key_BTKH, value_BTKH) -> Attended
Attend = Callable[[jax.Array, jax.Array, jax.Array], Attended]


def causal(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, *, kind: str
) -> jax.Array:
    """Mixed values [B, T, N, H] of every token attending to itself and those before it.

    Args:
        kind: "xla", "chunked" (the same for `QUERIES` queries at a time: that part of the memory),
            "cudnn", or "auto": cudnn where it can run, else xla. JAX refuses to trace cudnn
            attention where the library is missing, so "auto" goes by the devices present.

    Raises:
        ConfigError: "cudnn" is asked for where it cannot run.
    """
    if kind == "auto":
        fits = fits_cudnn(query_BTNH.dtype, query_BTNH.shape[-1])
        kind = "cudnn" if fits and cudnn_lacks(jax.devices()[0]) is None else "xla"
    elif kind == "cudnn" and cudnn_lacks(jax.devices()[0]):
        raise ConfigError(
            f"model.attention is cudnn, but {cudnn_lacks(jax.devices()[0])}; use auto or chunked."
        )
    elif kind == "chunked":
        return _chunked(query_BTNH, key_BTKH, value_BTKH)
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=kind)
    if kind == "xla":  # recompute [B, N, T, T] probabilities rather than keep those of every layer
        attend = jax.checkpoint(attend, prevent_cse=False)
    return attend(query_BTNH, key_BTKH, value_BTKH)


def _chunked(query_BTNH, key_BTKH, value_BTKH) -> jax.Array:
    batch, length, *heads = query_BTNH.shape
    queries = min(QUERIES, length)
    padded = jnp.pad(query_BTNH, ((0, 0), (0, -length % queries), (0, 0), (0, 0)))
    chunks = padded.reshape(batch, -1, queries, *heads).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(chunk):
        first, query = chunk
        seen = (first + jnp.arange(queries))[:, None] >= jnp.arange(length)
        return jax.nn.dot_product_attention(query, key_BTKH, value_BTKH, mask=seen[None, None])

    firsts = jnp.arange(0, padded.shape[1], queries)
    mixed = jax.lax.map(attend, (firsts, chunks)).swapaxes(0, 1)
    return mixed.reshape(padded.shape)[:, :length]


def fits_cudnn(dtype, head_size: int) -> bool:
    return jnp.dtype(dtype) == jnp.bfloat16 and head_size in range(8, 129, 8)


def cudnn_lacks(device: jax.Device) -> str | None:
    """Why cuDNN attention cannot run on `device`, or None."""
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return f"{device.device_kind} is not an NVIDIA GPU"
    if float(device.compute_capability) < 8.0:
        return f"{device.device_kind} has compute capability {device.compute_capability}, below 8.0"
    return None


class Attention(nnx.Module):
    """Parameters of one attention layer; `attend` decides what is attended to."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, heads, kv_heads, size = (
            config.model_dim, config.num_heads, config.num_kv_heads, config.head_size
        )  # fmt: skip
        std, dtype = config.init_std, config.param_dtype
        self.norm = nnx.Param(jnp.ones(dim))
        self.query = normal(rngs, dim, heads, size, std=std, dtype=dtype)
        self.key = normal(rngs, dim, kv_heads, size, std=std, dtype=dtype)
        self.value = normal(rngs, dim, kv_heads, size, std=std, dtype=dtype)
        self.out = normal(rngs, heads, size, dim, std=residual_std(config), dtype=dtype)
        if config.qk_norm == "rms":
            self.query_norm = nnx.Param(jnp.ones(size))
            self.key_norm = nnx.Param(jnp.ones(size))
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        by: Rotation,
        attend: Attend,
        change_values: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Attended:
        """Attended, projected back to [B, T, D]; `change_values` sees [B, T, K, H]."""
        config, dtype = self.config, x_BTD.dtype
        query = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.query[...].astype(dtype))
        key = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.key[...].astype(dtype))
        value = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.value[...].astype(dtype))
        if config.qk_norm == "rms":
            query = rms_norm(query, self.query_norm[...], eps=config.norm_eps)
            key = rms_norm(key, self.key_norm[...], eps=config.norm_eps)
        if change_values:
            value = change_values(value)
        query = rotate(query, by)
        key = rotate(key, by)
        mixed, kept = attend(query, key, value)
        return Attended(jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(dtype)), kept)
