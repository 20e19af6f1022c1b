# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Everything in eight_devices.py and eight_devices_maps.py, in processes that have so many."""

import os
import pathlib
import subprocess
import sys

import pytest
from drawn import SEED
from pythons import FAST_TO_COMPILE, newest, oldest


def on_eight_devices(which: str, *, optimize: bool, name: str = "eight_devices") -> None:
    level = "--xla_backend_optimization_level=3" if optimize else FAST_TO_COMPILE
    flags = os.environ["XLA_FLAGS"].replace(FAST_TO_COMPILE, level)
    flags += " --xla_force_host_platform_device_count=8"
    file = pathlib.Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", str(file), "-k", which],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, f"LAYOUT_SEED={SEED}\n{done.stdout[-8000:]}"
    assert " passed" in done.stdout


@newest
def test_bits():
    """Of optimized programs: only in those are products and sums fused, in some layouts."""
    on_eight_devices("same_bits", optimize=True)


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("trains_as_one_device", marks=oldest),
        pytest.param("not (trains_as_one_device or same_bits)", marks=newest),
    ],
)
def test_all_else(which):
    """Nearly all of the time goes into compiling what then runs for milliseconds."""
    on_eight_devices(which, optimize=False)


@newest
def test_maps():
    on_eight_devices("", optimize=False, name="eight_devices_maps")
