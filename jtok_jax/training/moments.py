# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Moments of an optimizer by parameter: those of one run, for another one that begins with them.

Of the backbone they are Adam's mu and nu, and the count of their steps. Of a table they are the
leaves of its optimizer, whose clocks are set back: the run that begins is at step 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.store.tables import HostTables
from jtok_jax.training.state import TrainState

Moments = dict[str, dict[str, jax.Array]]
OPT_STATE = "opt_state/"  # leaves of a checkpoint
TOUCHED = "touched"  # of rows: the step that last touched them


def accepted_steps(state: TrainState) -> jax.Array:
    """Return how many steps changed something: those that clocks of rows count."""
    return state.step - state.bad_steps


def moments_of(state: TrainState) -> Moments:
    """Return the moments of a run; of tables in host memory the scalars alone."""
    found = {}
    for group in state.opt_state["backbone"].inner_states.values():
        found |= _by_parameter(group.inner_state[0])
    steps = accepted_steps(state)
    for table, leaves in state.opt_state.items():
        if table != "backbone":
            found[table] = {
                leaf: value - steps if leaf == TOUCHED else value for leaf, value in leaves.items()
            }
    return found


def _by_parameter(adam: optax.ScaleByAdamState | dict[str, optax.ScaleByAdamState]) -> Moments:
    """Return Adam's state by parameter; a run that began with moments has it so."""
    if isinstance(adam, dict):
        return {name: one._asdict() for name, one in adam.items()}
    trained = [name for name, mu in adam.mu.items() if not isinstance(mu, optax.MaskedNode)]
    return {name: {"mu": adam.mu[name], "nu": adam.nu[name], "count": adam.count}
            for name in trained}  # fmt: skip


def with_moments(
    opt_state: dict[str, object], moments: Moments, convert: Callable
) -> dict[str, object]:
    """Return the first state of an optimizer, of `init_moments`, with moments in it.

    Args:
        opt_state: shapes, dtypes and shardings.
        convert: (name of the parameter, of the leaf; what it will be; its value in `moments`, None
            if there is none) -> the leaf. One without a value is zero, as all are in a new state.

    Raises ConfigError: a table's optimizer is another.
    """
    for table in opt_state.keys() & moments.keys():
        _require_same_kind(table, opt_state[table].keys() == moments[table].keys())

    def converted(path, like):
        name, leaf = (getattr(key, "key", getattr(key, "name", "")) for key in path[-2:])
        return convert(name, leaf, like, moments.get(name, {}).get(leaf))

    return jax.tree_util.tree_map_with_path(converted, opt_state)


def on_devices(
    name: str, leaf: str, like: jax.ShapeDtypeStruct, value: jax.Array | None
) -> jax.Array:
    """Return a moment in its sharding; a count is that of every slice. See `with_moments`."""
    if value is None:
        return jnp.zeros(like.shape, like.dtype, device=like.sharding)
    if leaf == "count":
        value = jnp.broadcast_to(value, like.shape)
    _require_same_kind(name, value.shape == like.shape)
    return jax.device_put(value, like.sharding)


def fill_moments(tables: HostTables, others: HostTables, state: TrainState) -> None:
    """Write the optimizer's leaves of another run's tables into those in host memory.

    state: of the other run.

    Raises ConfigError: a table's optimizer is another.
    """
    steps = np.int32(accepted_steps(state))
    leaves = {name: one for name, one in others.by_name().items() if name.startswith(OPT_STATE)}
    for name, value in leaves.items():
        table, _, leaf = name.removeprefix(OPT_STATE).rpartition("/")
        wanted = tables.saved_shapes.get(name)
        _require_same_kind(table, wanted is not None and wanted.shape == value.shape)
        for start, piece in value.local_pieces():
            tables.fill(name, start, piece - steps if leaf == TOUCHED else piece)


def require_same_betas(config: Config, other: Config) -> None:
    """Raise ConfigError if moments of the backbone have been gathered with other weights."""
    now, then = config.optimizer, other.optimizer
    for name in ("b1", "b2"):
        value = getattr(then, name)
        if getattr(now, name) != value:
            raise ConfigError(
                f"init_moments: optimizer.{name} is {getattr(now, name)} and was {value} in the "
                f"other run. Pass --config.optimizer.{name}={value}, or init_moments=false."
            )


def _require_same_kind(table: str, is_same: bool) -> None:
    if not is_same:
        raise ConfigError(
            f"init_moments: the optimizer of {table} was another, or one without weight decay "
            "where now is some, or the reverse. Set optimizer.tables as the other run had it, or "
            "init_moments=false."
        )
