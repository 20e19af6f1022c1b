# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Learning-rate schedules and AdamW in three groups: matrices, vectors, token tables."""

import optax

from jtok_jax.config import Config
from jtok_jax.flops import VECTORS


def schedule(config: Config) -> optax.Schedule:
    """Learning rate by step (from 0): linear warm-up, then cosine, WSD or constant."""
    options, steps, peak = config.schedule, config.schedule_steps, config.optimizer.learning_rate
    warmup = round(options.warmup_fraction * steps)
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 0))
    final = options.final_fraction
    if options.kind == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=final)
    elif options.kind == "wsd":
        decay = round(options.decay_fraction * steps)
        fall = optax.linear_schedule(peak, peak * final, decay)
        stay = optax.constant_schedule(peak)
        rest = optax.join_schedules([stay, fall], [steps - warmup - decay]) if decay else stay
    else:
        rest = optax.constant_schedule(peak)
    return optax.join_schedules([rise, rest], [warmup])


def group(name: str) -> str:
    """The optimizer group of a parameter by name."""
    if name == "tables":
        return "tables"
    return "vectors" if name.endswith(VECTORS) else "matrices"


def make_optimizer(config: Config, names: list[str]) -> optax.GradientTransformation:
    """Clip by the global norm of all gradients, then AdamW by group."""
    options, tables = config.optimizer, config.optimizer.tables
    rate = schedule(config)
    backbone = {"learning_rate": rate, "b1": options.b1, "b2": options.b2, "eps": options.eps}
    groups = {
        "matrices": optax.adamw(**backbone, weight_decay=options.weight_decay),
        "vectors": optax.adamw(**backbone, weight_decay=0.0),
        "tables": optax.adamw(
            lambda step: rate(step) * tables.learning_rate_multiplier,
            b1=tables.b1,
            b2=tables.b2,
            eps=options.eps,
            weight_decay=tables.weight_decay,
        ),
    }
    by_group = optax.partition(groups, {name: group(name) for name in names})
    if options.clip_norm == 0:
        return by_group
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), by_group)
