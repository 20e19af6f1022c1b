# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What an arm says of its parameters, and what it sees of the model it is in."""

from typing import NamedTuple

import jax
from jtok_kernels import NORMS

from jtok_jax.errors import ConfigError

Params = dict[str, jax.Array]  # of one arm by name; of one layer where it has some in every layer


class Sizes(NamedTuple):
    """Of the model an arm is in; see the legend in jtok_jax."""

    vocab: int  # rows of the embedding, padding included
    dim: int
    kv_heads: int
    head_dim: int


class Seen(NamedTuple):
    """What a layer's feed-forward update can depend on."""

    ids_BT: jax.Array
    pre_BTD: jax.Array  # normed input of attention
    post_BTD: jax.Array  # normed input of the feed-forward
    before_BTD: jax.Array  # as pre_BTD, of the layer before; the first layer's own


class Parameter(NamedTuple):
    """One array: `start` + normal(0, `std`) in float32.

    A name that ends in "table" is a table of vectors by token: optimizer.tables sets its learning
    rate and decay. "scale" and "bias" have no decay. Anything else is a matrix of the backbone,
    unless it is `looked_up` by token: without FLOPs, and counted as a table.
    """

    axes: str  # letters as in jtok_jax; small ones are arms' own: one letter, one size
    shape: tuple[int, ...]
    std: float = 0.0
    start: float = 0.0
    looked_up: bool = False


def check(arm: object, name: str, *counts: str, norms: tuple[str, ...] = NORMS) -> None:
    """Raise ConfigError at an option of `arm` that cannot be; `counts` are at least 1."""
    for option in counts:
        if getattr(arm, option) < 1:
            raise ConfigError(
                f"model.arms.{name}.{option} is {getattr(arm, option)}; expected at least 1."
            )
    if getattr(arm, "norm", "rms") not in norms:
        raise ConfigError(
            f"model.arms.{name}.norm is {arm.norm!r}; expected one of {', '.join(norms)}."
        )
    if getattr(arm, "init_std", 0.0) < 0:
        raise ConfigError(f"model.arms.{name}.init_std is {arm.init_std}; expected at least 0.")
