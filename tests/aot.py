# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Compiling for real TPUs and H100s on a machine that has neither: pip install -e '.[aot]'."""

import functools
import re

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jtok_jax.mesh import AUTO, AXES
from jtok_jax.planning.compiled import absent_devices, lacks, not_cached


@functools.cache
def h100(count: int = 1) -> Mesh:
    """Mesh of H100s of one host along fsdp; skips the test where they cannot be compiled for."""
    return _mesh("h100", "gpu", count)


@functools.cache
def tpu(name: str, count: int = 1) -> Mesh:
    """Mesh of the first devices of a TPU topology such as v5e:2x2, along fsdp."""
    return _mesh(name, "tpu", count)


def _mesh(name: str, platform: str, count: int) -> Mesh:
    if missing := lacks(platform):
        pytest.skip(f"{missing} (make test-latest)")
    devices = absent_devices(name, count).reshape(1, count, 1, 1)
    return Mesh(devices, AXES, axis_types=AUTO)


def compile_for(mesh: Mesh, function, *shapes, donate=(), only_lower=False, options=None):
    """`function` of ShapeDtypeStructs, compiled (or only lowered) for the devices of `mesh`."""
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda x: x.update(sharding=whole) if x.sharding is None else x
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), not_cached():
        jitted = jax.jit(function, donate_argnums=donate)
        lowered = jitted.lower(*jax.tree.map(place, shapes))
        return lowered if only_lower else lowered.compile(compiler_options=options)


def spills(ptxas: str, *, kernels: tuple[int, ...]) -> list[str]:
    """What ptxas said of spilled registers in each kernel (MOSAIC_GPU_DUMP_PTXAS).

    `kernels`: how many there may be; one that this process has compiled before is not told again.
    """
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    assert len(found) in kernels, f"other kernels than expected went through ptxas: {ptxas!r}"
    return [pair for pair in found if pair != ("0", "0")]


def copies_of(text: str, shape: tuple[int, ...]) -> list[str]:
    """Lines of a compiled program that copy, transpose or slice out an array of `shape`."""
    size = ",".join(map(str, shape))
    made = re.compile(rf"= \w+\[{size}\]\S* (copy|transpose|slice|dynamic-slice|broadcast)\(")
    return [line.strip() for line in text.splitlines() if made.search(line)]
