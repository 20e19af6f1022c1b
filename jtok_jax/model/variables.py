# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The kinds of parameters. Each says where it is made all that other code has to know of it.

Shardings, optimizer groups, counts, inference dtypes and the plan are read off these variables by
`jtok_jax.model.params.declared`. Nothing is known by the name of a parameter.
"""

import jax
import jax.numpy as jnp
from flax import nnx

WHOLE = (1, 1)


class Parameter(nnx.Param):
    """An array with one letter for each axis, see jtok_jax; blocks leave out the leading L.

    Metadata:
        axes: letters, such as "DNH"; `jtok_jax.mesh.RULES` says what splits them.
        share: (n, m): a token is multiplied by n / m of the entries.
        full_precision: it stays in float32 for inference.
    """

    def __init__(self, value, axes: str, *, share=WHOLE, full_precision=False, **metadata):
        super().__init__(value, axes=axes, share=share, full_precision=full_precision, **metadata)


class Weight(Parameter):
    """A matrix that tokens are multiplied by; it decays."""


class Embedding(Parameter):
    """A matrix whose rows are looked up by token, with dense gradients; it decays."""


class Vector(Parameter):
    """The weight of a norm, a scale or a bias; it does not decay."""


class Table(Parameter):
    """A stack of tables whose rows an id stream looks up; gradients are of the rows of a step.

    It lies at the top of a model and layers index it, so that no layer's part is ever sliced.

    Metadata:
        stream: name of the id stream.
        layers: for each layer its index in the stack, -1 for none; (): read once, at the input.
        owner: what reads it, "jtok" or the name of an arm; its options bear that name.
        implementation: of the operations on it, see `jtok_jax.model.operations`.
        top_k: how many tables of a stack [G, M, R, D] a token mixes; 0: there is no choice.
    """

    def __init__(
        self, value, axes: str, *, stream: str, layers: tuple[int, ...], owner: str,
        implementation: str = "auto", top_k: int = 0, **metadata,
    ):  # fmt: skip
        own = {"stream": stream, "layers": layers, "owner": owner, "top_k": top_k}
        super().__init__(value, axes, implementation=implementation, **own, **metadata)


def normal(
    rngs: nnx.Rngs,
    *shape: int,
    axes: str,
    std: float,
    dtype: str = "float32",
    pad: tuple[int, int] = (0, 0),
    kind: type[Parameter] = Weight,
    **metadata,
) -> Parameter:
    """Return a parameter drawn from normal(0, std), with `pad` zeros after the last two axes."""
    key = rngs.params()
    value = std * jax.random.normal(key, shape) if std else jnp.zeros(shape)
    value = value.astype(dtype)
    if any(pad):
        widths = [(0, 0)] * (len(shape) - 2) + [(0, extra) for extra in pad]
        value = jnp.pad(value, widths)
    return kind(value, axes, **metadata)


def ones(size: int, axes: str) -> Vector:
    """Return the float32 weight of a norm, [size]."""
    return Vector(jnp.ones(size, jnp.float32), axes)
