# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Grouped-query causal attention with rotary positions."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jtok_kernels import num_devices

from jtok_jax.errors import ConfigError
from jtok_jax.model.layers import Rotation, block_norm, residual_std, rms_norm, rotate
from jtok_jax.model.pattention import apply_linear, linear
from jtok_jax.model.splash import obstacle, splash
from jtok_jax.model.variables import Vector, ones
from jtok_jax.model_config import ModelConfig


class AttentionResult(NamedTuple):
    """Mixed values [B, T, N, H], and what an inference cache takes of this layer."""

    mixed: jax.Array
    cached: object


class Choice(NamedTuple):
    """A kind of attention, and why it runs."""

    kind: str
    reason: str


QUERIES = 512  # of a chunk, kind "chunked"
ROTATED = "rotated heads"  # kept by remat "dots" in place of what they are made of
SIMULATED = "splash:interpret"  # splash's kernels simulated on a CPU, for tests

# (query_BTNH, key_BTKH, value_BTKH) -> AttentionResult
Attend = Callable[[jax.Array, jax.Array, jax.Array], AttentionResult]


def choose(kind: str, *, dtype, head_size: int, length: int, placed: bool = True) -> Choice:
    """Return the kind of attention that runs for `kind`, and why.

    "auto" is splash on a TPU and cudnn on a GPU where they can run, else xla. The device is that of
    an abstract mesh in use (as when compiling ahead of time), else the first one.

    Args:
        length: tokens of a sequence, T.
        placed: there is one device, or a mesh is handed to `causal`. Else "auto" is never splash,
            which XLA cannot split over devices.

    Raises:
        ConfigError: "splash" or "cudnn" is asked for where it cannot run.
    """
    if kind in ("xla", "chunked"):
        return Choice(kind, "asked for")
    device = _device_kind()
    if kind == "cudnn" or (kind == "auto" and not device.startswith("TPU")):
        lacks = cudnn_lacks(jax.devices()[0])
        if not (lacks or fits_cudnn(dtype, head_size)):
            lacks = "cuDNN takes bfloat16 and a head size that is a multiple of 8, at most 128"
        if kind == "auto":
            return Choice("xla", lacks) if lacks else Choice("cudnn", device)
    else:
        on_tpu = device.startswith("TPU") or kind == SIMULATED
        lacks = obstacle(dtype, head_size, length) if on_tpu else f"{device} is not a TPU"
    if kind == "auto":
        lacks = lacks or (None if placed else "XLA cannot split splash attention over devices")
        return Choice("xla", lacks) if lacks else Choice("splash", device)
    if lacks:
        raise ConfigError(f"model.attention is {kind}, but {lacks}; use auto or chunked.")
    return Choice(kind, "asked for")


def choice_of(config: ModelConfig, length: int) -> Choice:
    """Return what `choose` says of a model's sequences of `length` tokens."""
    dtype, size = config.compute_dtype, config.head_size
    return choose(config.attention, dtype=dtype, head_size=size, length=length)


def causal(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    *,
    kind: str,
    segment_ids_BT: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Return mixed values [B, T, N, H] of every token attending to itself and those before it.

    Args:
        kind: "xla", "chunked" (the same for `QUERIES` queries at a time: that part of the memory),
            "cudnn", "splash", `SIMULATED`, or "auto"; see `choose`.
        segment_ids_BT: int32; a token attends only to tokens with its own id. None: to all.
        mesh: several devices, as `splash` wants them.

    Raises:
        ConfigError: "splash" or "cudnn" is asked for where it cannot run.
    """
    _, length, _, size = query_BTNH.shape
    placed = mesh is not None or num_devices() == 1
    kind, _ = choose(kind, dtype=query_BTNH.dtype, head_size=size, length=length, placed=placed)
    if kind in ("splash", SIMULATED):
        options = {"segment_ids_BT": segment_ids_BT, "mesh": mesh, "interpret": kind == SIMULATED}
        return splash(query_BTNH, key_BTKH, value_BTKH, **options)
    if kind == "chunked":
        return _chunked(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT)
    mask = None
    if segment_ids_BT is not None:
        mask = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None])[:, None]
    attend = functools.partial(
        jax.nn.dot_product_attention, mask=mask, is_causal=True, implementation=kind
    )
    if kind == "xla":  # recompute [B, N, T, T] probabilities rather than keep those of every layer
        attend = jax.checkpoint(attend, prevent_cse=False)
    return attend(query_BTNH, key_BTKH, value_BTKH)


def _chunked(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT) -> jax.Array:
    batch, length, *heads = query_BTNH.shape
    queries = min(QUERIES, length)
    padded = jnp.pad(query_BTNH, ((0, 0), (0, -length % queries), (0, 0), (0, 0)))
    chunks = padded.reshape(batch, -1, queries, *heads).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(chunk):
        first, query = chunk
        places = first + jnp.arange(queries)
        seen = (places[:, None] >= jnp.arange(length))[None, None]
        if segment_ids_BT is not None:  # queries of the padding are dropped, whatever they read
            own = segment_ids_BT[:, jnp.minimum(places, length - 1), None]
            seen = seen & (own == segment_ids_BT[:, None])[:, None]
        return jax.nn.dot_product_attention(query, key_BTKH, value_BTKH, mask=seen)

    firsts = jnp.arange(0, padded.shape[1], queries)
    mixed = jax.lax.map(attend, (firsts, chunks)).swapaxes(0, 1)
    return mixed.reshape(padded.shape)[:, :length]


def _device_kind() -> str:
    """Return the kind of the device in use: that of an abstract mesh, else the first there is."""
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def fits_cudnn(dtype, head_size: int) -> bool:
    """Return whether cuDNN attention takes such arrays."""
    return jnp.dtype(dtype) == jnp.bfloat16 and head_size in range(8, 129, 8)


def cudnn_lacks(device: jax.Device) -> str | None:
    """Return why cuDNN attention cannot run on `device`, or None."""
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
        make = functools.partial(linear, config, rngs=rngs)
        std, of_keys = config.init_std, (kv_heads, size)
        self.norm = block_norm(config)
        self.query = make((dim,), (heads, size), axes="DNH", std=std)
        self.key = make((dim,), of_keys, axes="DKH", std=std)
        self.value = make((dim,), of_keys, axes="DKH", std=std)
        self.out = make((heads, size), (dim,), axes="NHD", std=residual_std(config))
        if config.qk_norm == "rms":
            self.query_norm = ones(size, "H")
            self.key_norm = ones(size, "H")
        if config.attention_bias != "none":
            self.query_bias = Vector(jnp.zeros((heads, size), jnp.float32), "NH")
            self.key_bias = Vector(jnp.zeros((kv_heads, size), jnp.float32), "KH")
            self.value_bias = Vector(jnp.zeros((kv_heads, size), jnp.float32), "KH")
        if config.attention_bias == "qkvo":
            self.out_bias = Vector(jnp.zeros(dim, jnp.float32), "D")
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        rope: Rotation,
        attend: Attend,
        change_values: Callable[[jax.Array], jax.Array] | None = None,
    ) -> AttentionResult:
        """Return the result projected back to [B, T, D]; `change_values` sees [B, T, K, H]."""
        config, dtype = self.config, x_BTD.dtype
        query = apply_linear(self.query, x_BTD, "BTD,DNH->BTNH")
        key = apply_linear(self.key, x_BTD, "BTD,DKH->BTKH")
        value = apply_linear(self.value, x_BTD, "BTD,DKH->BTKH")
        if config.attention_bias != "none":
            query = query + self.query_bias[...].astype(dtype)
            key = key + self.key_bias[...].astype(dtype)
            value = value + self.value_bias[...].astype(dtype)
        if config.qk_norm == "rms":
            query = rms_norm(query, self.query_norm[...], eps=config.norm_eps)
            key = rms_norm(key, self.key_norm[...], eps=config.norm_eps)
        value = change_values(value) if change_values else value
        query = checkpoint_name(rotate(query, rope), ROTATED)
        key = checkpoint_name(rotate(key, rope), ROTATED)
        mixed, cached = attend(query, key, value)
        out_BTD = apply_linear(self.out, mixed, "BTNH,NHD->BTD")
        if config.attention_bias == "qkvo":
            out_BTD = out_BTD + self.out_bias[...].astype(dtype)
        return AttentionResult(out_BTD, cached)
