# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Row gradients against autodiff of a plain gather; the plan; memory of the table path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jtok_kernels import dense_gradient, gather_rows, row_plan
from jtok_kernels.rows import num_unique
from small import one_device

from jtok_jax.config import Config, JtokConfig, ModelConfig, TrainConfig
from jtok_jax.model.params import bind, init_params
from jtok_jax.training.step import _gradients, _plan

IDS = {
    "repeated": [4, 4, 1, 4, 1, 0, 22],
    "single": [5] * 7,
    "unique": [3, 1, 4, 0, 5, 9, 2],
    "one token": [6],
    "more tokens than rows": list(np.random.default_rng(0).integers(0, 23, 40)),
}


@pytest.mark.parametrize("name", IDS)
def test_row_gradients_equal_autodiff_of_a_plain_gather(name):
    ids = jnp.array(IDS[name], jnp.int32)
    rng = np.random.default_rng(1)
    tables = jnp.float32(rng.standard_normal((2, 3, 23, 5)))
    choice = jnp.int32(rng.integers(0, 3, (ids.size, 2)))
    weights = jnp.float32(rng.standard_normal((ids.size, 2, 5)))
    plan = row_plan(ids, num_rows=23)
    np.testing.assert_array_equal(plan.unique_U[plan.place], ids)

    def plain(tables):
        return jnp.sum(weights * jnp.sin(tables[1, choice, ids[:, None]]))

    def ours(row_grads):
        rows = gather_rows(tables, row_grads, jnp.int32(1), choice, ids, plan.place)
        return jnp.sum(weights * jnp.sin(rows))

    zeros = jnp.zeros((3, num_unique(ids.size, 23), 5))
    value, row_grads = jax.value_and_grad(ours)(zeros)
    layers = jnp.stack([jnp.zeros_like(row_grads), row_grads])
    dense = dense_gradient(layers, plan.unique_U, stack_of_layer=(0, 1), num_rows=23)
    np.testing.assert_allclose(value, plain(tables), **tolerances.FORWARD["float32"])
    np.testing.assert_allclose(dense, jax.grad(plain)(tables), **tolerances.FORWARD["float32"])


def _model(vocab_size: int) -> ModelConfig:
    # A tied head would hide the tables behind logits; the hidden states alone are compiled.
    return ModelConfig(
        vocab_size=vocab_size,
        model_dim=64,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=64,
        compute_dtype="float32",
        jtok=JtokConfig(kind="jtok_m", num_tables=2, top_k=2),
    )


def _temporaries(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_forward_holds_no_copy_or_slice_of_the_tables():
    def forward(vocab_size):
        config = _model(vocab_size)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)
        return _temporaries(lambda params, ids: bind(config, params)(ids).hidden_BTD, params, ids)

    assert forward(1 << 14) <= forward(1 << 10) + 4096


def test_backward_holds_no_table_beside_the_gradient_itself():
    """No layer's [M, V, D] gradient, no sum of them: the dense gradient is written once."""

    def temporaries(vocab_size):
        model = dataclasses.replace(_model(vocab_size), loss_chunk=8)
        config = Config(model=model, train=TrainConfig(batch_size=2, seq_len=32))
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)

        def gradients(params, ids):
            return _gradients(config, params, ids, ids, _plan(model, ids), one_device())[1]

        return _temporaries(gradients, params, ids)

    small, large = temporaries(1 << 10), temporaries(1 << 14)
    embedding = ((1 << 14) - (1 << 10)) * 64 * 4
    # Gradients of embedding and head and their accumulators grow; one table set is 6 embeddings.
    assert large - small <= 4 * embedding, (large - small) / embedding
