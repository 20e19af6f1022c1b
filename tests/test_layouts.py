# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Everything in eight_devices.py, in a process that has so many."""

import os
import pathlib
import subprocess
import sys

import jax


def test_eight_devices():
    # Nearly all of the time goes into compiling what then runs for milliseconds.
    flags = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = os.environ.get("XLA_FLAGS", "") + flags
    file = pathlib.Path(__file__).with_name("eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", str(file)]
    if jax.version.__version_info__ < (0, 11) and not os.environ.get("NIGHTLY"):
        # The time of two Pythons is shared: JTok, experts and optimizers are for the newer one.
        command += ["-k", "jtok_m or bits or alike or dropped or restores or room"]
    done = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
