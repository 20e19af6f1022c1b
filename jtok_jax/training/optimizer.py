# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Learning-rate schedules, and groups of parameters: matrices, vectors, tables by token id."""

from typing import NamedTuple

import jax
import jtok_kernels
import optax
from jtok_kernels import RowOptimizer

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.flops import TABLES, VECTORS


def schedule(config: Config) -> optax.Schedule:
    """Learning rate by step (from 0): linear warm-up, then cosine, WSD or constant."""
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


def group(name: str) -> str:
    """The AdamW group of a backbone parameter by name: decay acts on matrices alone.

    Tables of arms (jtok_jax/arms) are one, with the options of the token tables.
    """
    if name.endswith(TABLES):
        return "tables"
    return "vectors" if name.endswith(VECTORS) else "matrices"


class Optimizer(NamedTuple):
    """Clipping by the global norm of all gradients comes first and is the step's own business."""

    backbone: optax.GradientTransformation
    tables: RowOptimizer | None  # None: a model without tables

    def init(self, params: dict[str, jax.Array]) -> dict[str, object]:
        backbone, tables = split_tables(params)
        state = {"backbone": self.backbone.init(backbone)}
        return state | ({} if tables is None else {"tables": self.tables.init(tables)})


def split_tables(params: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """(backbone, tables) of a flat dict of parameters."""
    backbone = {name: value for name, value in params.items() if name != "tables"}
    return backbone, params.get("tables")


def make_optimizer(config: Config) -> Optimizer:
    """AdamW of the backbone, and what `optimizer.tables.kind` names for the tables.

    Raises:
        ConfigError: that is not adamw, and arms have tables.
    """
    options, tables = config.optimizer, config.optimizer.tables
    rate = schedule(config)
    adamw = {"learning_rate": rate, "b1": options.b1, "b2": options.b2, "eps": options.eps}
    groups = {
        "matrices": optax.adamw(**adamw, weight_decay=options.weight_decay),
        "vectors": optax.adamw(**adamw, weight_decay=0.0),
        "tables": optax.adamw(
            lambda step: rate(step) * tables.learning_rate_multiplier,
            b1=tables.b1, b2=tables.b2, eps=options.eps, weight_decay=tables.weight_decay,
        ),
    }  # fmt: skip
    labels = {name: group(name) for name in flops.parameter_axes(config.model) if name != "tables"}
    if "tables" in labels.values() and tables.kind != "adamw":
        raise ConfigError(
            f"optimizer.tables.kind is {tables.kind!r}, but tables of arms "
            f"({config.model.arms.names}) take dense gradients; set adamw."
        )
    used = {name: groups[name] for name in groups if name in labels.values()}
    backbone = optax.partition(used, labels)
    if config.model.tables_shape is None:
        return Optimizer(backbone, None)
    betas = {} if tables.kind == "rowwise_adagrad" else {"b1": tables.b1, "b2": tables.b2}
    make = getattr(jtok_kernels, tables.kind)
    return Optimizer(backbone, make(**betas, eps=options.eps, weight_decay=tables.weight_decay))
