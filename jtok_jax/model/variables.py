# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The kinds of parameters. Each says where it is made all that other code has to know of it.

Shardings, optimizer groups, counts, inference dtypes and the plan are read off these variables by
`jtok_jax.model.params.declared`. Nothing is known by the name of a parameter.
"""

import math

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx

WHOLE = (1, 1)


class Parameter(nnx.Param):
    """An array with one letter for each axis, see jtok_jax; blocks leave out the leading L.

    Metadata:
        axes: letters, such as "DNH"; `jtok_jax.mesh.RULES` says what splits them.
        share: (n, m): a token is multiplied by n / m of the entries.
        full_precision: it stays in float32 for inference.
        owner: the layer beside the backbone that it belongs to, "jtok" or the name of an arm; its
            options bear that name. "": it is of the backbone.
    """

    def __init__(
        self, value, axes: str, *, share=WHOLE, full_precision=False, owner="", **metadata
    ):  # fmt: skip
        own = {"axes": axes, "share": share, "full_precision": full_precision, "owner": owner}
        super().__init__(value, **own, **metadata)


class Weight(Parameter):
    """A matrix that tokens are multiplied by; it decays."""


class Embedding(Parameter):
    """A matrix whose rows are looked up by token, with dense gradients; it decays."""


class Vector(Parameter):
    """The weight of a norm, a scale or a bias; it does not decay."""


class Index(nnx.Variable):
    """Integers that tokens are found in: no parameter, so no gradient is taken of them."""

    def __init__(self, value, axes: str, **metadata):
        own = {"axes": axes, "share": (0, 1), "full_precision": True, "owner": ""}
        super().__init__(value, **own, **metadata)


class Table(Parameter):
    """A stack of tables whose rows an id stream looks up; gradients are of the rows of a step.

    It lies at the top of a model and layers index it, so that no layer's part is ever sliced.

    Metadata:
        stream: name of the id stream.
        layers: for each layer its index in the stack, -1 for none; (): read once, at the input.
        implementation: of the operations on it, see `jtok_jax.model.operations`.
        top_k: how many tables of a stack [G, M, R, D] a token mixes; 0: there is no choice.
    """

    def __init__(
        self, value, axes: str, *, stream: str, layers: tuple[int, ...],
        implementation: str = "auto", top_k: int = 0, **metadata,
    ):  # fmt: skip
        own = {"stream": stream, "layers": layers, "top_k": top_k}
        super().__init__(value, axes, implementation=implementation, **own, **metadata)


def owned(module: nnx.Module, owner: str) -> nnx.Module:
    """Return a module whose every parameter says that it belongs to `owner`."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, Parameter):
            node.set_metadata("owner", owner)
    return module


def normal(
    rngs: nnx.Rngs,
    *shape: int,
    axes: str,
    std: float,
    dtype: str = "float32",
    pad: tuple[int, int] = (0, 0),
    kind: type[Parameter] = Weight,
    rows: jax.Array | None = None,
    **metadata,
) -> Parameter:
    """Return a parameter drawn from normal(0, std), with `pad` zeros after the last two axes.

    Args:
        rows: int32 [U], to draw these along the last axis but one and no others; None: all.
    """
    key = rngs.params()
    if rows is not None and not std:
        value = jnp.zeros((*shape[:-2], rows.size, shape[-1]))
    elif rows is not None:
        # Nothing stands between the two products: XLA makes one of them, here as in the whole.
        value = jnp.where(rows[:, None] < shape[-2], std * _normal_rows(key, shape, rows), 0)
    else:
        value = std * jax.random.normal(key, shape) if std else jnp.zeros(shape)
    value = value.astype(dtype)
    if any(pad) and rows is None:
        widths = [(0, 0)] * (len(shape) - 2) + [(0, extra) for extra in pad]
        value = jnp.pad(value, widths)
    return kind(value, axes, **metadata)


def _normal_rows(key: jax.Array, shape: tuple[int, ...], rows: jax.Array) -> jax.Array:
    """Return the bits of `jax.random.normal(key, shape)[..., rows, :]`.

    JAX draws every entry from its place alone (jax_threefry_partitionable, the default).
    """
    *stack, length, width = shape
    row = jnp.arange(math.prod(stack), dtype=jnp.uint32)[:, None] * length + rows.astype(jnp.uint32)
    # row * width + column in two words: a table may have more than 2^32 entries.
    low = row * jnp.uint32(width)
    high = ((row >> 16) * width + ((row & 0xFFFF) * width >> 16)) >> 16
    place = low[..., None] + jnp.arange(width, dtype=jnp.uint32)
    high = jnp.broadcast_to(high[..., None], place.shape) + (place < low[..., None])
    words = jnp.stack([high, place]).astype(jnp.uint32)
    bits = jnp.bitwise_xor(*jax.extend.random.threefry_2x32(jax.random.key_data(key), words))
    unit = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1
    least = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
    uniform = jnp.maximum(least, unit * (1 - least) + least)
    return (jnp.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)).reshape(*stack, rows.size, width)


def ones(size: int, axes: str) -> Vector:
    """Return the float32 weight of a norm, [size]."""
    return Vector(jnp.ones(size, jnp.float32), axes)
