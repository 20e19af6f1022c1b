# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The compiler options of a training step: those of the project, and those of the run."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jtok_jax.checks import parse_options
from jtok_jax.config import Config
from jtok_jax.errors import ConfigError

# On several devices. Without them an exchange of rows waits for other collectives (LOG.md).
DEFAULTS = {
    "tpu": {"xla_tpu_enable_async_all_to_all": True},
    "gpu": {"xla_gpu_experimental_parallel_collective_overlap_limit": 4},
}


def compiler_options(config: Config, mesh: Mesh, platform: str) -> dict[str, object] | None:
    """Return the options that the step of `config` is compiled with on `mesh`, None for none.

    Options of train.compiler_options replace defaults of the same name.

    Raises:
        ConfigError: the compiler does not know one of them, or does not take its value.
    """
    given = parse_options(config.train.compiler_options, "train.compiler_options")
    if given:
        _try(given, mesh, platform)
    defaults = DEFAULTS.get(platform, {}) if mesh.size > 1 else {}
    return {**defaults, **given} or None


def _try(given: dict[str, object], mesh: Mesh, platform: str) -> None:
    """Compile next to nothing with `given`: the step itself would fail only after minutes."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(jnp.square, compiler_options=given).lower(scalar).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(" :.")
        raise ConfigError(
            f"train.compiler_options: the compiler for {platform} says: {reason}. Correct the "
            "option or leave it out; names differ between TPU, GPU and versions of the compiler."
        ) from error
