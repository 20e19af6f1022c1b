# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The TPU kernels, simulated, at every size; that they equal float64 is in test_modulate.py."""

import jax.numpy as jnp
import numpy as np
import pytest
from jtok_kernels.mosaic_tpu import BLOCKS, VMEM, MosaicTpu, Tuning, block_tokens, vmem_bytes
from operations import inputs
from pythons import oldest

SIZES = [
    Tuning(block=32, chunk=32, cores=1),  # 4 blocks of one core
    Tuning(block=16, chunk=16, unroll=16, cores=2),  # 4 and 3: the last step of a core is empty
    Tuning(block=256, chunk=64, cores=2),  # fewer tokens than a block
]


@oldest
@pytest.mark.parametrize("tuning", SIZES)
def test_every_size_reads_the_rows_of_its_tokens_and_nothing_races(tuning, capfd):
    x = inputs("primes")
    table, ids = jnp.float32(x.tables[0]), jnp.int32(x.ids)
    rows = MosaicTpu(True, tuning).mix_rows_forward(table, (), ids, None, None)
    np.testing.assert_array_equal(rows, table[ids])
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("count", "dim", "dtype", "top_k", "expected"), [
    (4096, 768, "uint32", 1, 256), (4096, 2048, "uint32", 2, 128),
    (4096, 4096, "float32", 2, 64), (100, 768, "uint32", 1, 128), (1, 768, "uint32", 1, 16),
])  # fmt: skip
def test_blocks_fit_vector_memory_and_the_tokens(count, dim, dtype, top_k, expected):
    tables = dim, jnp.dtype(dtype), top_k
    block = block_tokens(count, *tables, None)
    assert block == expected
    assert vmem_bytes(block, *tables) <= VMEM
    larger = [b for b in BLOCKS if b == 2 * block]
    assert not larger or block >= count or vmem_bytes(larger[0], *tables) > VMEM
