# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Grouped-query causal attention with rotary positions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jtok_jax.config import ModelConfig
from jtok_jax.model.layers import normal, residual_std, rms_norm, rotate


class Attended(NamedTuple):
    """Mixed values [B, T, N, H], and whatever an inference cache wants kept of this layer."""

    mixed: jax.Array
    kept: object


# (query_BTNH, key_BTKH, value_BTKH) -> Attended
Attend = Callable[[jax.Array, jax.Array, jax.Array], Attended]


def causal(query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, *, kind: str):
    """Attention of every token to itself and those before it.

    Args:
        kind: "xla", "cudnn", or "auto": cudnn for half-precision on a GPU, else xla.
    """

    def attend(implementation: str) -> Attend:
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=implementation
        )

    arguments = query_BTNH, key_BTKH, value_BTKH
    if kind != "auto":
        return attend(kind)(*arguments)
    if query_BTNH.dtype == jnp.float32 or query_BTNH.shape[-1] % 8:  # cudnn takes neither
        return attend("xla")(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=attend("cudnn"), default=attend("xla"))


class Attention(nnx.Module):
    """Parameters of one attention layer; `attend` decides what is attended to."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, heads, kv_heads, size = (
            config.model_dim, config.num_heads, config.num_kv_heads, config.head_size
        )  # fmt: skip
        std, dtype = config.init_std, config.param_dtype
        self.norm = nnx.Param(jnp.ones(dim, dtype))
        self.query = normal(rngs, dim, heads, size, std=std, dtype=dtype)
        self.key = normal(rngs, dim, kv_heads, size, std=std, dtype=dtype)
        self.value = normal(rngs, dim, kv_heads, size, std=std, dtype=dtype)
        self.out = normal(rngs, heads, size, dim, std=residual_std(config), dtype=dtype)
        if config.qk_norm == "rms":
            self.query_norm = nnx.Param(jnp.ones(size, dtype))
            self.key_norm = nnx.Param(jnp.ones(size, dtype))
        self.config = config

    def __call__(self, x_BTD: jax.Array, *, positions_BT: jax.Array, attend: Attend) -> Attended:
        """Attended, projected back to [B, T, D]."""
        config, dtype = self.config, x_BTD.dtype
        query = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.query[...].astype(dtype))
        key = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.key[...].astype(dtype))
        value = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.value[...].astype(dtype))
        if config.qk_norm == "rms":
            query = rms_norm(query, self.query_norm[...], eps=config.norm_eps)
            key = rms_norm(key, self.key_norm[...], eps=config.norm_eps)
        query = rotate(query, positions_BT, base=config.rope_base)
        key = rotate(key, positions_BT, base=config.rope_base)
        mixed, kept = attend(query, key, value)
        return Attended(jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(dtype)), kept)
