# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The row plan holds every token once, and packing keeps every bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jtok_kernels import pack_rows, row_plan, unpack_rows
from operations import CASES
from pythons import oldest

pytestmark = oldest


@pytest.mark.parametrize("microbatches", [0, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_holds_every_token_once_in_order(case, microbatches):
    ids, num_rows = np.array(CASES[case][0], np.int32), CASES[case][1]
    if microbatches:
        ids = np.stack([np.roll(ids, shift) for shift in range(microbatches)])
    plan = jax.jit(functools.partial(row_plan, num_rows=num_rows))(jnp.asarray(ids))
    unique = np.unique(ids)
    np.testing.assert_array_equal(plan.unique_U[: unique.size], unique)
    assert np.all(plan.unique_U[unique.size :] == num_rows)
    assert plan.unique_U.size == min(ids.size, num_rows)
    for index in range(max(microbatches, 1)):
        mine, order = ids, plan.order
        if microbatches:
            mine, order = ids[index], jax.tree.map(lambda x, index=index: x[index], plan.order)
        np.testing.assert_array_equal(plan.unique_U[order.place], mine)
        np.testing.assert_array_equal(order.token, np.argsort(mine, kind="stable"))
        count, sizes = int(order.piece_count), np.asarray(order.piece_size)
        assert np.all(np.diff(sizes) <= 0), "large pieces come first"
        assert np.all(order.piece_run[:count] < plan.unique_U.size)
        assert np.all(order.piece_run[count:] == plan.unique_U.size)
        found, by_start = [], np.lexsort((-sizes, order.piece_start))
        for run_, start, size in zip(
            order.piece_run[by_start], order.piece_start[by_start], sizes[by_start], strict=True
        ):
            assert 0 <= size <= 32
            tokens = order.token[start : start + size]
            if size:
                assert np.all(mine[tokens] == plan.unique_U[run_])
                found.extend(tokens.tolist())
        assert found == order.token.tolist()
        pieces = np.maximum(1, -(-np.bincount(order.place, minlength=plan.unique_U.size) // 32))
        found = np.bincount(order.piece_run, minlength=plan.unique_U.size + 1)
        np.testing.assert_array_equal(found[:-1], pieces)
        split = np.flatnonzero(pieces > 1)
        np.testing.assert_array_equal(order.split_run[: split.size], split)
        assert np.all(order.split_run[split.size :] == plan.unique_U.size)
        for run_, first, end in zip(
            order.split_run, order.split_slot[:-1], order.split_slot[1:], strict=True
        ):
            slots = np.asarray(order.piece_slot)[np.asarray(order.piece_run) == run_]
            if run_ < plan.unique_U.size:
                np.testing.assert_array_equal(slots, np.arange(first, end))
            else:
                assert first == end
        assert np.sum(np.asarray(order.piece_slot) >= 0) == pieces[split].sum()


@pytest.mark.parametrize("ids", [np.zeros(0, np.int32), np.zeros(3), np.zeros((1, 2, 3), np.int32)])
def test_a_plan_needs_int32_ids(ids):
    with pytest.raises(ValueError, match="expected int32"):
        row_plan(jnp.asarray(ids), num_rows=5)


def test_packing_keeps_every_bit():
    bits = np.random.default_rng(0).integers(0, 1 << 16, (3, 7, 64), np.uint16)
    table = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    finite = jnp.where(jnp.isnan(table), 0, table)
    packed = pack_rows(finite)
    assert packed.shape == (3, 7, 32)
    np.testing.assert_array_equal(unpack_rows(packed), finite)
    with pytest.raises(ValueError, match="expected bfloat16 of an even D"):
        pack_rows(finite[..., :63])


@pytest.mark.parametrize("microbatches", [0, 2])
def test_a_tighter_bound_holds_the_same_rows(microbatches):
    ids = jnp.int32([4, 4, 1, 4, 1, 0, 22, 0])
    ids = ids.reshape(microbatches, -1) if microbatches else ids
    plan, tight = (row_plan(ids, num_rows=23, max_unique=bound) for bound in (None, 5))
    assert plan.unique_U.size == 8
    assert tight.unique_U.tolist() == [0, 1, 4, 22, 23]
    np.testing.assert_array_equal(tight.order.place, plan.order.place)
    np.testing.assert_array_equal(tight.order.token, plan.order.token)
    assert plan.overflow is None
    assert not tight.overflow


@pytest.mark.parametrize("bound", [1, 3])
def test_too_many_ids_are_told(bound):
    ids = jnp.int32([4, 4, 1, 4, 1, 0, 22, 0])
    plan = row_plan(ids, num_rows=23, max_unique=bound)
    assert plan.overflow
    assert plan.unique_U.tolist() == [0, 1, 4][:bound]
    assert 0 <= plan.order.place.min() <= plan.order.place.max() < bound
    assert row_plan(ids, num_rows=23, max_unique=8).overflow is None  # there cannot be more
    with pytest.raises(ValueError, match="max_unique is 0; expected at least 1"):
        row_plan(ids, num_rows=23, max_unique=0)
