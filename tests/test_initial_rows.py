# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Rows of tables drawn apart from the rest of them, as tables in host memory need."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import scipy.special
from small import DENSE, JTOK_M, with_every_table

from jtok_jax.model.params import declared_tables, init_params, init_rows
from jtok_jax.model.variables import _normal_rows

EVERYTHING = with_every_table(
    dataclasses.replace(DENSE, jtok=dataclasses.replace(JTOK_M, num_tables=3, table_init_std=0.02))
)


def test_rows_of_tables_are_drawn_apart_as_in_the_whole():
    """Bit for bit, in both dtypes, rows of padding among them."""
    arms = dataclasses.replace(EVERYTHING.arms, table_dtype="bfloat16")
    model = dataclasses.replace(EVERYTHING, arms=arms, vocab_multiple=8)
    key = jax.random.key(3)
    whole = jax.jit(init_params, static_argnums=0)(model, key)
    streams, rng = model.id_streams, np.random.default_rng(0)
    ids = {name: jnp.asarray(rng.permutation(s.num_rows)[:9]) for name, s in streams.items()}
    ids["token"] = jnp.append(ids["token"], model.padded_vocab - 1)
    assert model.padded_vocab > model.vocab_size
    apart = init_rows(model, key, ids)
    assert apart.keys() == declared_tables(model).keys()
    for name, table in declared_tables(model).items():
        assert apart[name].dtype == table.dtype
        expected = np.asarray(whole[name])[..., np.asarray(ids[table.stream]), :]
        np.testing.assert_array_equal(np.asarray(apart[name]), expected, name)


def test_rows_of_a_table_of_more_than_32_bits_are_drawn_by_their_place():
    key, rows, shape = jax.random.key(5), [0, 7, 2**30 - 1], (3, 2**30, 100)
    found = _normal_rows(key, shape, jnp.asarray(rows))
    stack, row, column = np.meshgrid(range(3), rows, range(100), indexing="ij")
    places = (stack * 2**30 + row) * 100 + column  # int64
    words = np.stack([places >> 32, places & 0xFFFFFFFF]).astype(np.uint32)
    high, low = jax.extend.random.threefry_2x32(jax.random.key_data(key), jnp.asarray(words))
    unit = (np.asarray(high ^ low) >> 9) / 2**23 * 2 - 1
    np.testing.assert_allclose(found, np.sqrt(2) * scipy.special.erfinv(unit), rtol=1e-3)
