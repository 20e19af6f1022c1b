# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Stacks of layers in the host memory of a device, used layer by layer inside a compiled step.

Nothing is computed there. A layer's part is moved to the device, and what it becomes is moved back.
Where an array lies is in its type, so functions ask the array.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jtok_jax.errors import ConfigError

KIND = "pinned_host"  # the memory kind of shardings
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def require(mesh: Mesh) -> None:
    """Raise ConfigError where devices of this process have no such memory."""
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if KIND not in kinds:
        raise ConfigError(
            f"mesh.table_streaming is on, and {device.device_kind} has no memory of the kind "
            f"{KIND}, but {', '.join(kinds)}. Set mesh.table_streaming=False."
        )


def is_on_host(array: jax.Array) -> bool:
    """Return whether an array, or a tracer, is in host memory."""
    return jax.typeof(array).memory_space == HOST


def to_host(array: jax.Array) -> jax.Array:
    """Return an array in host memory; traced."""
    return jax.device_put(array, HOST)


def to_place_of(array: jax.Array, like: jax.Array) -> jax.Array:
    """Return an array where another is; traced."""
    return to_host(array) if is_on_host(like) else array


def to_device(array: jax.Array) -> jax.Array:
    """Return an array in the memory of the device; traced."""
    return jax.device_put(array, DEVICE) if is_on_host(array) else array


def layer_of(stack: jax.Array, index: jax.Array | int) -> jax.Array:
    """Return one layer of a stack, [1, ...], on the device."""
    return to_device(jax.lax.dynamic_slice_in_dim(stack, index, 1))


def map_layers(function: Callable, carry, *stacks, at: np.ndarray | None = None):
    """Return (carry, results) of (carry, index, *layers) -> (carry, results), layer after layer.

    Args:
        stacks: trees of arrays [G, ...]; a layer, [...], is on the device.
        at: the layers; None: all.

    Results are stacked where those of a layer are.
    """

    def body(carry, index):
        layers = jax.tree.map(lambda stack: layer_of(stack, index)[0], stacks)
        return function(carry, index, *layers)

    if at is None:
        at = jnp.arange(jax.tree.leaves(stacks)[0].shape[0])
    return jax.lax.scan(body, carry, at)


def stack_of(make: Callable, layers: int) -> jax.Array:
    """Return in host memory what make(layers), [layers, ...], returns of one layer at a time."""
    one = lambda carry, _: (carry, to_host(make(1)[0]))
    return jax.lax.scan(one, None, length=layers)[1]


def elementwise(function: Callable, *arrays: jax.Array) -> jax.Array:
    """Return function(*arrays), which lie where the result will."""
    if not is_on_host(arrays[0]):
        return function(*arrays)
    of_layer = lambda carry, index, *layers: (carry, to_host(function(*layers)))
    return map_layers(of_layer, None, *arrays)[1]
