# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.doctor: are the versions and devices here fit for training, and what runs?"""

import importlib.metadata
import platform
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtok_jax import flops
from jtok_jax.hosts import PACKAGES
from jtok_jax.model.attention import cudnn_lacks
from jtok_jax.model.operations import choose_operations
from jtok_jax.model.splash import LANES

SUPPORTED = ((0, 10, 2), (0, 13))  # jax: from, below
GPU_FROM = (0, 11, 1)  # earlier jaxlib compiles float32 scatter-add to a very slow loop
FLAX_FOR_JAX = [((0, 11, 2), (0, 12, 10)), ((0, 11, 1), (0, 12, 9)), ((0, 10, 2), (0, 12, 8))]


class Finding(NamedTuple):
    """One judgement; `advice` is empty where nothing needs doing."""

    subject: str
    found: str
    advice: str = ""


def version_tuple(version: str) -> tuple[int, ...]:
    """Return (0, 10, 2) of "0.10.2" or "0.10.2.dev3"."""
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def judge_versions(jax_version: str, flax_version: str, backend: str) -> list[Finding]:
    """Return findings on the pair of JAX and Flax for a backend ("cpu", "gpu", "tpu")."""
    found_jax, found_flax = version_tuple(jax_version), version_tuple(flax_version)
    advice = ""
    if not SUPPORTED[0] <= found_jax < SUPPORTED[1]:
        advice = "outside the tested window 0.10.2 to 0.12; install with a file in constraints/"
    elif backend == "gpu" and found_jax < GPU_FROM:
        advice = "on GPUs use JAX 0.11.1 or newer (Python 3.12): scatter-add is very slow before"
    findings = [Finding("jax", jax_version, advice)]
    needed = next((flax for jax_from, flax in FLAX_FOR_JAX if found_jax >= jax_from), (0, 12, 8))
    text = ".".join(map(str, needed))
    advice = "" if found_flax >= needed else f"this JAX needs flax {text} or newer"
    return [*findings, Finding("flax", flax_version, advice)]


def describe_device(device: jax.Device) -> list[Finding]:
    """Return what training would use, what the automatic choices come to, and why."""
    peak = None if device.platform == "cpu" else flops.peak_flops(device.device_kind)
    speed = f"{peak / 1e12:.0f} TFLOP/s bfloat16 each" if peak else "no peak known, MFU not shown"
    lacks = cudnn_lacks(device)
    attention = f"xla ({lacks})" if lacks else "cudnn for bfloat16, xla for float32"
    experts = "row blocks (ragged_dot grows with experts off TPU)"
    if device.platform == "tpu":
        attention = f"splash for sequences of a multiple of {LANES} tokens, else xla"
        experts = "lax.ragged_dot"
    kind = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    findings = [
        Finding("devices", f"{kind}, {speed}"),
        Finding("attention", attention),
        Finding("experts", experts),
    ]
    for dtype in flops.BYTES:
        choice = choose_operations("auto", dim=1024, dtype=jnp.dtype(dtype))
        findings.append(Finding(f"{dtype} tables", f"{choice.name} ({choice.reason})"))
    return findings


def main() -> None:
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # of a backend that JAX_PLATFORMS asks for
        reason = (str(error) or "JAX finds no backend").splitlines()[0]
        advice = "see JAX_PLATFORMS, the driver, and which was installed, '.[cuda]' or '.[tpu]'"
        sys.exit(f"!!  devices           none: {reason}  <- {advice}")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    judged = judge_versions(versions["jax"], versions["flax"], device.platform)
    others = [Finding(name, versions[name]) for name in PACKAGES if name not in ("jax", "flax")]
    python = Finding("python", platform.python_version())
    findings = [python, *judged, *others, *describe_device(device)]
    for finding in findings:
        mark = "!!" if finding.advice else "ok"
        advice = f"  <- {finding.advice}" if finding.advice else ""
        print(f"{mark}  {finding.subject:<17} {finding.found}{advice}")
    if any(finding.advice for finding in findings):
        print("Not ready: follow the advice above.")
        sys.exit(1)
    print("Ready.")


if __name__ == "__main__":
    main()
