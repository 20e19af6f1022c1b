# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Parameters of the arms that are on, bound to the pure functions of jtok_jax/arms."""

import jax
import jax.numpy as jnp
from flax import nnx

from jtok_jax.arms import Parameter, Seen
from jtok_jax.flops import arm_parameters
from jtok_jax.model_config import ModelConfig


class ArmParameters(nnx.Module):
    """Of one arm, by name."""

    def __init__(self, parameters: dict[str, Parameter], *, rngs: nnx.Rngs):
        for name, (_, shape, std, start, _) in parameters.items():
            noise = std * jax.random.normal(rngs.params(), shape) if std else jnp.zeros(shape)
            setattr(self, name, nnx.Param(start + noise))


class Arms(nnx.Module):
    """Those of a model ("arms") or of one of its layers ("blocks/arms")."""

    def __init__(self, config: ModelConfig, place: str, *, rngs: nnx.Rngs):
        self.config = config.arms
        of_arm: dict[str, dict[str, Parameter]] = {}
        for path, parameter in arm_parameters(config).items():
            where, arm, name = path.rsplit("/", 2)
            if where == place:
                of_arm.setdefault(arm, {})[name] = parameter
        for arm, parameters in of_arm.items():
            setattr(self, arm, ArmParameters(parameters, rngs=rngs))

    def embed(self, h_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        return self._run("embed", h_BTD, ids_BT)

    def values(self, value_BTKH: jax.Array, ids_BT: jax.Array) -> jax.Array:
        return self._run("values", value_BTKH, ids_BT)

    def increment(self, dm_BTD: jax.Array, seen: Seen) -> jax.Array:
        return self._run("increment", dm_BTD, seen)

    def _run(self, method: str, value: jax.Array, seen: jax.Array | Seen) -> jax.Array:
        for name, arm in self.config.chosen().items():
            if hasattr(arm, method):
                held = nnx.to_pure_dict(nnx.state(getattr(self, name)))
                value = getattr(arm, method)(held, value, seen)
        return value
