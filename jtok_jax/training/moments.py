# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Moments of an optimizer by parameter: those of one run, for another one that begins with them.

Of the backbone they are Adam's mu and nu, and the count of their steps. Of a table they are the
leaves of its optimizer, whose clocks are set back: the run that begins is at step 0.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
import optax

from jtok_jax.errors import ConfigError
from jtok_jax.store.tables import HostTables
from jtok_jax.training.state import TrainState

Moments = dict[str, dict[str, jax.Array]]
TOUCHED = "touched"  # of rows: the step that last touched them


def moments_of(state: TrainState) -> Moments:
    """Return the moments of a run; of tables in host memory the scalars alone."""
    found = {}
    for group in state.opt_state["backbone"].inner_states.values():
        found |= _by_parameter(group.inner_state[0])
    steps = state.step - state.bad_steps
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
    state: dict[str, object], moments: Mapping[str, Mapping], place: Callable
) -> dict[str, object]:
    """Return a state of an optimizer, of `init_moments`, with moments in it.

    A parameter without any keeps what it has.

    Args:
        place: (name of the parameter, name of the leaf, the leaf before, the moment) -> the leaf.

    Raises ConfigError: a table's optimizer is another.
    """

    def leaf(path, before):
        name, leaf = (getattr(key, "key", getattr(key, "name", "")) for key in path[-2:])
        if name not in moments:
            return before
        _require_same_kind(name, leaf in moments[name])
        return place(name, leaf, before, moments[name][leaf])

    return jax.tree_util.tree_map_with_path(leaf, state)


def placed(name: str, leaf: str, before: jax.Array, value: jax.Array) -> jax.Array:
    """Return a moment where the leaf before it is; a count is that of every slice."""
    if leaf == "count":
        value = jax.numpy.broadcast_to(value, before.shape)
    _require_same_kind(name, value.shape == before.shape)
    return jax.device_put(value, before.sharding)


def fill_moments(tables: HostTables, others: HostTables, steps: int) -> None:
    """Write the optimizer's leaves of another run's tables into those in host memory.

    steps: that the other run had taken.

    Raises ConfigError: a table's optimizer is another.
    """
    for name, value in others.by_name().items():
        if not name.startswith("opt_state/"):
            continue
        table, _, leaf = name.removeprefix("opt_state/").rpartition("/")
        fits = name in tables.saved_shapes and tables.saved_shapes[name].shape == value.shape
        _require_same_kind(table, fits)
        for start, piece in value.local_pieces():
            tables.fill(name, start, piece - np.int32(steps) if leaf == TOUCHED else piece)


def _require_same_kind(name: str, is_same: bool) -> None:
    if not is_same:
        raise ConfigError(
            f"init_moments: the optimizer of {name} was another, or had other weight decay. Set "
            "optimizer.tables as the other run had it, or init_moments=false."
        )
