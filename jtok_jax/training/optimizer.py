# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Learning-rate schedules, and groups of parameters: matrices, vectors, tables."""

from typing import NamedTuple

import jax.numpy as jnp
import jtok_kernels
import optax
from jtok_kernels import RowOptimizer

from jtok_jax.config import Config, TableOptimizerConfig
from jtok_jax.model.params import Declared, Params, declared, declared_tables
from jtok_jax.model.variables import Vector
from jtok_jax.model_config import ModelConfig


def schedule(config: Config) -> optax.Schedule:
    """Return the learning rate by step (from 0): linear warm-up, then cosine, WSD or constant."""
    options, steps, peak = config.schedule, config.schedule_steps, config.optimizer.learning_rate
    warmup = round(options.warmup_fraction * steps)
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 0))
    final = options.final_fraction
    stay = optax.constant_schedule(peak)

    def wsd() -> optax.Schedule:
        decay = round(options.decay_fraction * steps)
        fall = optax.linear_schedule(peak, peak * final, decay)
        return optax.join_schedules([stay, fall], [steps - warmup - decay]) if decay else stay

    rest = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=final),
        "wsd": wsd,
        "constant": lambda: stay,
    }
    return optax.join_schedules([rise, rest[options.kind]()], [warmup])


GROWING = "LVSM"  # axes along which jtok_jax.grow adds: layers, vocabulary, slots, tables


class Optimizer(NamedTuple):
    """Clipping by the global norm of all gradients comes first and is the step's own business."""

    backbone: optax.GradientTransformation
    trained: frozenset[str]  # parameters that `backbone` updates
    rows: dict[str, RowOptimizer]  # by table

    def init(self, params: Params) -> dict[str, object]:
        """Return the state: under "backbone", and under the name of every table."""
        backbone, others = self.split(params)
        of_tables = {name: rows.init(others[name]) for name, rows in self.rows.items()}
        return {"backbone": self.backbone.init(backbone)} | of_tables

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return (those that `backbone` updates, all others: tables, and what is frozen)."""
        backbone = {name: params[name] for name in params if name in self.trained}
        return backbone, {name: params[name] for name in params if name not in self.trained}


def groups(model: ModelConfig, *, frozen: str = "none") -> dict[str, str]:
    """Return the AdamW group of all that it trains, not of tables: decay acts on matrices alone.

    Args:
        frozen: "backbone" leaves out all but the parameters of JTok and of arms.
    """
    return {
        name: "vectors" if issubclass(one.kind, Vector) else "matrices"
        for name, one in declared(model).items()
        if not (one.is_table or one.is_index) and (one.owner or frozen == "none")
    }


def make_optimizer(config: Config) -> Optimizer:
    """Return AdamW of the backbone, and what `optimizer.tables` says of every table."""
    options = config.optimizer
    adam = optax.scale_by_adam(options.b1, options.b2, options.eps)
    if config.init_moments:
        adam = _with_clocks(adam, config.model)
    rate = optax.scale_by_learning_rate(schedule(config))
    decays = {"matrices": options.weight_decay, "vectors": 0.0}
    by_group = {
        name: optax.chain(adam, optax.add_decayed_weights(decay), rate)
        for name, decay in decays.items()
    }
    labels = groups(config.model, frozen=options.frozen)
    backbone = optax.partition(by_group, labels)
    rows = {
        name: _row_optimizer(options.tables.of(table.owner), options.eps)
        for name, table in declared_tables(config.model).items()
    }
    return Optimizer(backbone, frozenset(labels), rows)


def count_shape(one: Declared) -> tuple[int, ...]:
    """Return the shape of a parameter that is 1 along all axes but those of `GROWING`."""
    axes = zip(one.axes, one.shape, strict=True)
    return tuple(size if axis in GROWING else 1 for axis, size in axes)


def _with_clocks(adam: optax.GradientTransformation, model: ModelConfig):
    """Return Adam with a count of steps for every slice that a growth may have added.

    Its state is that of Adam for each parameter, with a count of `count_shape`.
    """
    shapes = {name: count_shape(one) for name, one in declared(model).items()}

    def init(params):
        trained = {
            name: value for name, value in params.items() if not isinstance(value, optax.MaskedNode)
        }
        return {
            name: adam.init(value)._replace(count=jnp.zeros(shapes[name], jnp.int32))
            for name, value in trained.items()
        }

    def update(grads, state, params=None):
        new = {name: adam.update(grads[name], one) for name, one in state.items()}
        updates = {name: update for name, (update, _) in new.items()}
        return grads | updates, {name: one for name, (_, one) in new.items()}

    return optax.GradientTransformation(init, update)


def _row_optimizer(options: TableOptimizerConfig, eps: float) -> RowOptimizer:
    betas = {} if options.kind == "rowwise_adagrad" else {"b1": options.b1, "b2": options.b2}
    make = getattr(jtok_kernels, options.kind)
    return make(**betas, eps=eps, weight_decay=options.weight_decay)
