# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Everything a training step changes, born in its final sharding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtok_jax.config import Config
from jtok_jax.mesh import replicated
from jtok_jax.model.params import (
    Params,
    declared,
    declared_tables,
    init_params,
    initial_options,
    to_logical,
    to_stored,
)
from jtok_jax.model.placement import parameter_sharding
from jtok_jax.training.optimizer import Optimizer

COUNT = jax.tree_util.GetAttrKey("count")  # of Adam's steps


class TrainState(NamedTuple):
    """State of a run after `step` steps; but for tables in host memory, which a store holds."""

    step: jax.Array  # int32
    params: Params
    opt_state: dict[str, object]  # of Optimizer.init
    bad_steps: jax.Array  # int32, steps skipped as not finite
    bad_in_row: jax.Array  # int32, how many of them were the last ones


def init_state(config: Config, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Return the state before step 1, a pure function of `train.seed`."""
    build = _builder(config, optimizer)
    key = jax.random.key(config.train.seed)
    shardings = state_shardings(config, optimizer, mesh)
    return jax.jit(build, out_shardings=shardings, compiler_options=initial_options())(key)


def abstract_state(config: Config, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Return shapes, dtypes and shardings of the state, without any memory."""
    shapes = jax.eval_shape(_builder(config, optimizer), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, optimizer, mesh),
    )


def as_saved(state: TrainState) -> TrainState:
    """Return a state with tables in their logical shape, whatever is held here."""
    return state._replace(params=to_logical(state.params))


def named_leaves(state: TrainState) -> dict[str, jax.Array]:
    """Return every leaf of a state by its path, such as "params/embed"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def state_shardings(config: Config, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Return the NamedSharding of every leaf; a moment is split as the parameter it belongs to.

    The optimizer of the tables has leaves of their shape, of one number a row, and scalars.
    """
    names, place = declared(config.model), parameter_sharding(config, mesh)

    def leaf_sharding(path, leaf):
        keys = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        name = next((key for key in reversed(keys) if key in names), None)  # groups have names too
        if name is None or leaf.ndim == 0 or path[-1] == COUNT:
            return replicated(mesh)
        return place(name, leaf.shape)

    shapes = jax.eval_shape(_builder(config, optimizer), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf_sharding, shapes)


def non_finite(params: Params) -> list[str]:
    """Return the names of the logical parameters that hold a NaN or an infinity; waits for them."""
    finite = jax.device_get(_all_finite(params))
    return [name for name, value in finite.items() if not value]


@jax.jit
def _all_finite(params: Params) -> dict[str, jax.Array]:
    return {name: jnp.all(jnp.isfinite(value)) for name, value in params.items()}


def _builder(config: Config, optimizer: Optimizer):
    def build(key: jax.Array) -> TrainState:
        params = init_params(config.model, key)
        zero = jnp.zeros((), jnp.int32)
        # Moments are float32 whatever the parameters are, as the gradients are.
        masters = {name: value.astype(jnp.float32) for name, value in params.items()}
        opt_state = optimizer.init(masters)
        if config.mesh.table_memory == "host":
            for name in declared_tables(config.model):
                del params[name]
                scalars = {leaf: x for leaf, x in opt_state[name].items() if not x.ndim}
                opt_state[name] = scalars
        return TrainState(zero, to_stored(config.model, params), opt_state, zero, zero)

    return build
