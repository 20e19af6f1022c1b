# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""train.compiler_options reach the compiler of the step; what it does not take is told."""

import dataclasses

import aot
import jax
import jax.numpy as jnp
import pytest
from pythons import oldest
from small import KINDS, one_device, small_config

from jtok_jax.errors import ConfigError
from jtok_jax.planning.compiled import not_cached
from jtok_jax.training.compiler import compiler_options
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state
from jtok_jax.training.step import jit_train_step


def options_of(text: str):
    config = small_config(KINDS["dense"])
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, compiler_options=text)
    )


@oldest
def test_an_option_changes_the_compiled_step():
    def compiled(text):
        config, mesh = options_of(text), one_device()
        optimizer = make_optimizer(config)
        size = config.train.batch_size, config.train.seq_len
        batch = jax.ShapeDtypeStruct(size, jnp.int32)
        step = jit_train_step(config, optimizer, mesh)
        return step.lower(abstract_state(config, optimizer, mesh), batch, batch).compile().as_text()

    noted = "known_trip_count"
    assert noted in compiled("")
    assert noted not in compiled("--xla_disable_hlo_passes=while-loop-trip-count-annotator")


def test_options_of_a_run_replace_those_of_the_project():
    mesh = aot.tpu("v5e:2x2", 4)

    def checked(text):
        with not_cached():
            return compiler_options(options_of(text), mesh, "tpu")

    name = "xla_tpu_enable_async_all_to_all"
    assert checked("") == {name: True}
    threshold = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
    text = f"--{threshold}=1000000 {name}=False"
    assert checked(text) == {threshold: "1000000", name: False}
    with pytest.raises(ConfigError, match=f"compiler for tpu says: Failed to parse 'x' .*{name}"):
        checked(f"{name}=x")


@oldest
@pytest.mark.parametrize(("text", "says"), [
    ("--xla_gpu_autotune_level=0 --xla_fast=true", "No such compile option: 'xla_fast'. Correct"),
    ("--xla_gpu_autotune_level=x", "While setting option xla_gpu_autotune_level, 'x' is not a"),
])  # fmt: skip
def test_what_the_compiler_does_not_take_is_told_before_the_step_is_built(text, says):
    config = options_of(text)
    with pytest.raises(ConfigError, match=f"the compiler for cpu says: {says}") as caught:
        jit_train_step(config, make_optimizer(config), one_device())
    assert "\n" not in str(caught.value)
