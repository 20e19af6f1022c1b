# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""`make test-latest` leaves out what hardly depends on the version: `make test` has run it.

Any other call of pytest runs everything the JAX at hand can run.
"""

import importlib.metadata
import os

import pytest

OLD = tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11)
NIGHTLY = bool(os.environ.get("NIGHTLY"))
SECOND = bool(os.environ.get("SECOND_PYTHON")) and not NIGHTLY  # set by make test-latest
# Programs are compiled here that run once. Newer JAX has no choice of emitters; where there is one,
# the simple ones take half the time.
FAST_TO_COMPILE = "--xla_backend_optimization_level=0"
if OLD:
    FAST_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
else:  # two workers have no core to spare for parts compiled at a time
    FAST_TO_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"
# For jax.jit, where bits are compared: with the emitters that users have.
COMPILER_OPTIONS = {"xla_cpu_use_fusion_emitters": True} if OLD else {}
newest = pytest.mark.skipif(OLD and not NIGHTLY, reason="make test-latest has it, or NIGHTLY=1")
oldest = pytest.mark.skipif(SECOND, reason="make test has it, or NIGHTLY=1")
