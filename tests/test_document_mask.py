# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Documents in one window that do not see each other: `model.document_id`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pythons import oldest
from small import (
    DENSE,
    KINDS,
    gradients,
    numbers_of,
    one_device,
    random_params,
    small_config,
    with_every_table,
)
from test_data import run_config

from jtok_jax.errors import ConfigError
from jtok_jax.model.params import bind, declared_tables
from jtok_jax.training.step import make_eval_step
from train import train

pytestmark = oldest
BEGIN = 3
MODELS = {
    "dense": DENSE,
    "chunked": dataclasses.replace(DENSE, attention="chunked"),
    "jtok_m and every table": with_every_table(KINDS["dense-jtok_m"]),
}


def documents(*lengths: int) -> list[np.ndarray]:
    """Return ids of documents, each with `BEGIN` first and nowhere else."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(BEGIN + 1, DENSE.vocab_size, length) for length in lengths]
    return [np.concatenate([[BEGIN], text]).astype(np.int32) for text in texts]


@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_read_as_if_it_were_alone(name):
    """Also the end of one whose beginning lies in the window before."""
    model = dataclasses.replace(MODELS[name], document_id=BEGIN)
    params, texts = random_params(model), documents(9, 1, 4, 12)
    texts[0] = texts[0][3:]
    window = np.concatenate(texts)[None]
    hidden = lambda model, ids: np.asarray(bind(model, params)(jnp.asarray(ids)).hidden_BTD[0])
    together, start = hidden(model, window), 0
    for text in texts:
        alone = hidden(model, text[None])
        np.testing.assert_allclose(together[start : start + len(text)], alone, rtol=2e-4, atol=2e-5)
        start += len(text)
    mixed = hidden(dataclasses.replace(model, document_id=-1), window)
    assert np.abs(mixed - together)[len(texts[0]) :].max() > 0.05


@pytest.mark.parametrize("name", ["dense", "jtok_m and every table"])
def test_a_step_trains_what_the_evaluation_reads(name):
    model = dataclasses.replace(MODELS[name], document_id=BEGIN)
    config, params = small_config(model), random_params(model)
    ids = jnp.asarray(np.resize(np.concatenate(documents(9, 1, 4, 12)), (4, 16)))
    targets = jnp.roll(ids, -1, axis=1)
    losses, grads = jax.jit(gradients, static_argnums=0)(config, params, ids, targets)
    sums = make_eval_step(config, one_device())(params, ids, targets, jnp.ones(ids.shape))
    np.testing.assert_allclose(losses.loss, sums.nats / sums.weight, rtol=1e-5)

    def loss(trained):
        bound = bind(model, params | trained)
        output = bound(ids)
        logits = output.hidden_BTD @ bound.head_DV
        sums = jax.nn.logsumexp(logits, axis=-1)
        nats = sums - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        balance = model.jtok.balance_weight * output.jtok_balance
        return nats.mean() + config.train.z_loss * jnp.square(sums).mean() + balance

    expected = jax.jit(jax.grad(loss))(numbers_of(params))
    for table in declared_tables(model):
        np.testing.assert_allclose(grads[table], expected[table], rtol=1e-3, atol=1e-5)


def test_a_document_id_that_is_not_that_of_the_data_is_refused(corpus, tmp_path):
    config = run_config(corpus, steps=2)
    model = dataclasses.replace(config.model, document_id=5)
    with pytest.raises(ConfigError, match="document_id is 5, but documents of the data begin with"):
        train(dataclasses.replace(config, model=model), tmp_path / "a")
    model = dataclasses.replace(config.model, document_id=0)
    train(dataclasses.replace(config, model=model), tmp_path / "b")
