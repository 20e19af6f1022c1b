# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Launch the GPU kernels and bring rows to their blocks.

One block is one warpgroup of 128 threads. It holds a row spread over its threads, D / 128 entries
each.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jtok_kernels.plan import Order

THREADS = 128
MAX_DIM = 4096  # wider rows no longer fit the registers of a block
MAX_HELD = 7 * 4096  # entries of the K rows of a token and five more vectors, held at once
SHARED = 224 << 10  # bytes of shared memory a block may take for its sums
PROCESSORS = 132  # of an H100 or H200; fixed, so that bits are
REGISTERS = 65536  # of a processor


def resident(dim: int, *, top_k: int = 0, num_tables: int = 0) -> int:
    """Return how many blocks of a backward pass a processor holds at once, at least 1.

    Registers of a thread are a fit to what ptxas says of these kernels (benchmarks/compiled.py).

    Args:
        top_k, num_tables: K and E of JTok-M; 0: JTok.
    """
    entries = dim // THREADS
    registers = 50 + (4.5 + top_k) * entries if top_k else 32 + 5.25 * entries
    registers = min(256, 8 * math.ceil(registers / 8))  # given out by eights
    shared = 4 * dim * (num_tables or 2)
    return max(1, min(16, REGISTERS // (THREADS * registers), SHARED // shared))


class Tuning(NamedTuple):
    """Select variants of the kernels that differ in speed alone; benchmarks compare them.

    delta_first: the backward pass loads `delta` before it stores `d_delta`.
    bulk_forward: forward kernels fetch their rows by bulk copies into shared memory.
    shared_rows: vectors that the loop of a backward pass does not use wait in shared memory, so
        that their registers hold more blocks.
    auto_barriers: Mosaic puts a barrier around every vector access.
    blocks: of a backward pass; None: as many as the registers let a GPU hold at once.
    """

    delta_first: bool = True
    bulk_forward: bool = True
    shared_rows: bool = True
    auto_barriers: bool = False
    blocks: int | None = None


class Blocks(NamedTuple):
    """Blocks of a Mosaic kernel; `interpret` simulates them on a CPU and looks for races."""

    interpret: bool = False
    tuning: Tuning = Tuning()

    def kernel(self, body, out, *, grid, axis, scratch=(), barriers: bool = False):
        """Return the function that runs `body` once for each place of the grid.

        barriers: after each access of memory, for bodies whose threads read what others write.
            Those of this file need none: no thread reads an entry that another has written, but
            through a reduction or a bulk copy, which wait by themselves.
        """
        grid, axis = ((grid,), (axis,)) if isinstance(axis, str) else (grid, axis)
        options = {}
        if self.interpret:
            options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
        barriers = barriers or self.tuning.auto_barriers
        params = plgpu.CompilerParams(unsafe_no_auto_barriers=not barriers)
        return plgpu.kernel(
            body, out_type=out, grid=grid, grid_names=axis, scratch_types=scratch,
            compiler_params=params, **options,
        )  # fmt: skip

    def blocks(self, order: Order, dim: int, *, top_k: int = 0, num_tables: int = 0) -> int:
        """Return the blocks of a backward pass: as many as a GPU holds at once."""
        blocks = self.tuning.blocks or PROCESSORS * resident(
            dim, top_k=top_k, num_tables=num_tables
        )
        return min(blocks, order.piece_run.size)

    def shared(self, count: int, dim: int):
        """Return scratch for `keeper`: room for so many vectors of a block."""
        return [plgpu.SMEM((dim,), jnp.float32)] * (count * self.tuning.shared_rows)

    def keeper(self, load, shared):
        """keep(x): a function that returns the vector x, which meanwhile takes no registers.

        Each thread reads back what it wrote itself.
        """
        left = iter(shared)

        def keep(x):
            if not self.tuning.shared_rows:
                return lambda: x
            ref = next(left)
            ref[...] = x
            return lambda: load(ref)

        return keep

    def room(self, dim: int, *dtypes):
        """Return scratch for `fetch`: room for rows of `dtypes`, and what tells their arrival."""
        if not self.tuning.bulk_forward:
            return ()
        rows = (plgpu.SMEM((dim // THREADS, THREADS), dtype) for dtype in dtypes)
        return *rows, plgpu.Barrier(num_arrivals=len(dtypes))

    def rows(self, x: jax.Array) -> jax.Array:
        """Return `x` [..., D] in parts of at most 256 entries, as bulk copies take it."""
        if not self.tuning.bulk_forward:
            return x
        return x.reshape(*x.shape[:-1], x.shape[-1] // THREADS, THREADS)

    def fetch(self, room, *sources):
        """Start copies of `sources`, refs of one row of `rows`, into `room`.

        Returns:
            A function that waits for them and returns their refs. Without bulk copies these are
            `sources`: loads stand where they are used, as the compiler would move them there.
        """
        if not self.tuning.bulk_forward:
            return lambda: sources
        *targets, barrier = room
        for source, target in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(source, target, barrier)

        def arrived():
            plgpu.barrier_wait(barrier)
            return targets

        return arrived

    def loader(self, *arrays: jax.Array):
        """load(ref of [D]): its entries in registers, as float32 unless `cast` is False.

        All rows of a kernel are spread over the threads alike, in vectors of up to 16 bytes of the
        narrowest of `arrays`: 16 where D is a multiple of 1024 (bfloat16) or 512, 4 at D 768.
        """

        def load(ref, *, cast=True):
            if self.interpret:  # it does not know layouts
                values = ref[...]
            else:
                layout = _layout(*arrays, shape=ref.shape)
                values = plgpu.load(ref, layout=layout, optimized=False)
            if values.ndim > 1:  # one row of `rows`
                values = values.reshape(values.size)
            return values.astype(jnp.float32) if cast else values

        return load

    def zeros(self, *arrays: jax.Array):
        """Return float32 zeros [D], spread as by `loader`."""
        zeros = jnp.zeros(arrays[0].shape[-1], jnp.float32)
        return zeros if self.interpret else plgpu.layout_cast(zeros, _layout(*arrays))

    def iota(self, *arrays: jax.Array):
        """Return uint32 [0, 1, ..., D - 1], spread as by `loader` of the same arrays."""
        dim = arrays[0].shape[-1]
        if self.interpret:
            return jnp.arange(dim, dtype=jnp.uint32)
        return plgpu.broadcasted_iota(jnp.uint32, (dim,), 0, layout=_layout(*arrays))


def _layout(*arrays: jax.Array, shape=None):
    dim = arrays[0].shape[-1]
    size = math.gcd(dim // THREADS, 16 // min(array.dtype.itemsize for array in arrays))
    return plgpu.Layout.WG_STRIDED(shape or (dim,), vec_size=size)


def whole(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return `arrays` such that none is a slice which XLA fuses with the kernel that reads it.

    It may clone such a fusion to save memory, and then runs the kernel once for every clone.
    """
    return jax.lax.optimization_barrier(arrays)
