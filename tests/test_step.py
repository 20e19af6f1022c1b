# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The training step: bad numbers, accumulation, remat, optimizer groups, schedules; the loss."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import tolerances
from pythons import oldest
from small import DENSE, KINDS, gradients, random_ids, random_params, small_config, training

from jtok_jax.config import SCHEDULES, OptimizerConfig, ScheduleConfig, TableOptimizerConfig
from jtok_jax.model import moe, routing
from jtok_jax.model.loss import cross_entropy
from jtok_jax.model.params import bind
from jtok_jax.training.optimizer import groups, schedule

replace = dataclasses.replace
JTOK_M = KINDS["dense-jtok_m"]
pytestmark = oldest


def _leaves_equal(a, b) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", ["dense", "dense-jtok_m"])
def test_a_bad_step_changes_nothing_but_counters(name):
    """A step with a NaN loss, then a good one: equal to the good one alone."""
    config = small_config(KINDS[name])
    state, step, _ = training(config)
    bad_id, ids = 7, random_ids(config.model, 4, 16)
    good = jnp.where(ids == bad_id, bad_id + 1, ids)
    bad = good.at[1, 3].set(bad_id)
    poisoned = state._replace(
        params=state.params | {"embed": state.params["embed"].at[bad_id].set(jnp.nan)}
    )
    after_bad, metrics = step(poisoned, bad, bad)
    assert not np.isfinite(metrics.loss)
    assert _leaves_equal(after_bad.opt_state, poisoned.opt_state)
    np.testing.assert_array_equal(
        after_bad.params["embed"][:bad_id], poisoned.params["embed"][:bad_id]
    )
    assert (after_bad.step, after_bad.bad_steps, after_bad.bad_in_row) == (1, 1, 1)
    again, metrics = step(after_bad, bad, bad)
    assert (again.bad_steps, again.bad_in_row) == (2, 2)
    healed = again._replace(params=again.params | {"embed": state.params["embed"]})
    after_good, metrics = step(healed, good, good)
    alone, metrics_alone = step(state, good, good)
    assert _leaves_equal(after_good.params, alone.params)
    assert _leaves_equal(after_good.opt_state, alone.opt_state)
    assert metrics.learning_rate == metrics_alone.learning_rate
    assert (after_good.bad_steps, after_good.bad_in_row) == (2, 0)


@pytest.mark.parametrize("name", ["dense-jtok", "dense-jtok_m"])
def test_accumulation_gives_the_same_step(name):
    """Without balance losses, which are those of a microbatch."""
    model = replace(KINDS[name], jtok=replace(KINDS[name].jtok, balance_weight=0.0))
    ids = random_ids(model, 4, 16)
    states = []
    for count in (1, 4):
        state, step, _ = training(small_config(model, grad_accumulation=count))
        states.append(step(state, ids, ids)[0])
    for key, value in states[0].params.items():
        np.testing.assert_allclose(value, states[1].params[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_remat_holds_less():
    def held(remat):
        model = replace(JTOK_M, num_layers=6, remat=remat)  # most of what a step holds is theirs
        config = small_config(model)
        config = replace(config, train=replace(config.train, batch_size=8, seq_len=64))
        state, step, _ = training(config)
        ids = random_ids(model, 8, 64)
        return step.lower(state, ids, ids).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = map(held, ("none", "dots", "full"))
    assert full < 0.75 * dots < 0.75**2 * none


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_does_not_change_numbers(remat):
    ids = random_ids(JTOK_M, 4, 16)
    state, step, _ = training(small_config(JTOK_M))
    _, rematted, _ = training(small_config(replace(JTOK_M, remat=remat)))
    (plain, _), (other, _) = step(state, ids, ids), rematted(state, ids, ids)
    for key, value in plain.params.items():
        np.testing.assert_allclose(value, other.params[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_optimizer_groups_are_adamw_with_their_own_settings():
    """First step by hand: Adam moves every entry by its rate, decay pulls matrices alone."""
    config = replace(
        small_config(JTOK_M),
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.2, clip_norm=0.0, eps=1e-30),
        schedule=ScheduleConfig(kind="constant", warmup_fraction=0.0),
    )
    state, _, optimizer = training(config)
    backbone, _ = optimizer.split(state.params)
    group = groups(config.model)
    grads = jax.tree.map(jnp.ones_like, backbone)
    updates, _ = optimizer.backbone.update(grads, state.opt_state["backbone"], backbone)
    for name, update in updates.items():
        decay = {"matrices": 0.2, "vectors": 0.0}[group[name]]
        expected = -0.01 * (1 + decay * backbone[name])
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7, err_msg=name)
    assert group["blocks/jtok/scale"] == group["blocks/attention/norm"] == "vectors"
    assert group["blocks/jtok/router"] == group["embed"] == group["head"] == "matrices"


@pytest.mark.parametrize("kind", ["adamw", "lazy_adam", "rowwise_adam", "rowwise_adagrad"])
def test_the_first_step_moves_the_rows_of_the_batch_by_their_own_rate(kind):
    """And by no more: rows of no token stay, but under dense AdamW with decay."""
    tables = TableOptimizerConfig(kind=kind, learning_rate_multiplier=3.0, weight_decay=0.5)
    options = OptimizerConfig(learning_rate=0.01, clip_norm=0.0, eps=1e-12, tables=tables)
    config = replace(
        small_config(KINDS["dense-jtok"]),
        optimizer=options,
        schedule=ScheduleConfig(kind="constant", warmup_fraction=0.0),
    )
    state, step, _ = training(config)
    ids = random_ids(config.model, 4, 16) // 2  # half the rows
    after, _ = step(state, ids, ids)
    old, new = (np.asarray(s.params["tables"]) for s in (state, after))
    used = np.isin(np.arange(config.model.vocab_size), ids)
    moved = new[:, used] - old[:, used] * (1 - 0.03 * 0.5)
    if kind in ("adamw", "lazy_adam"):
        np.testing.assert_allclose(np.abs(moved), 0.03, rtol=1e-4)
    else:
        np.testing.assert_allclose(np.sqrt(np.mean(moved**2, axis=-1)), 0.03, rtol=1e-4)
    rest = old[:, ~used] * (1 - 0.03 * 0.5 * (kind == "adamw"))
    np.testing.assert_allclose(new[:, ~used], rest, rtol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "lazy_adam"])
def test_rows_follow_the_warm_up(kind):
    """Rows that are read for the first time move by the rate of that step."""
    tables = TableOptimizerConfig(kind=kind, learning_rate_multiplier=3.0, weight_decay=0.0)
    config = replace(
        small_config(KINDS["dense-jtok"], steps=100),
        optimizer=OptimizerConfig(learning_rate=0.1, clip_norm=0.0, eps=1e-12, tables=tables),
        schedule=ScheduleConfig(warmup_fraction=0.1),
    )
    state, step, _ = training(config)
    ids, moved = random_ids(config.model, 4, 16) % 14, []
    for rows in (ids, ids + 14):
        before, (state, _) = state.params["tables"], step(state, rows, rows)
        moved.append(np.abs(state.params["tables"] - before)[:, np.unique(rows)].max())
    bias = 1.0
    if kind == "adamw":  # its clock is the run's: moments of a row's first step are corrected less
        m, v = (1 - tables.b1) / (1 - tables.b1**2), (1 - tables.b2) / (1 - tables.b2**2)
        bias = m / v**0.5
    np.testing.assert_allclose(moved, [0.03, 0.06 * bias], rtol=1e-3)


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e3])
def test_clipping_counts_table_gradients(limit):
    """The first moments are a tenth of the gradients that came through."""
    tables = TableOptimizerConfig(kind="adamw")
    options = OptimizerConfig(clip_norm=limit, tables=tables)
    config = replace(small_config(JTOK_M), optimizer=options)
    state, step, _ = training(config)
    ids = random_ids(config.model, 4, 16)
    after, metrics = step(state, ids, ids)
    _, grads = jax.jit(functools.partial(gradients, config))(state.params, ids, ids)
    norm = optax.tree.norm(grads)
    assert optax.tree.norm(grads["tables"]) > 0.01 * norm
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    factor = min(1.0, limit / norm) if limit else 1.0
    moments = {
        path[-1].key: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state["backbone"])
        if "mu" in jax.tree_util.keystr(path)
    } | {"tables": after.opt_state["tables"]["m"]}
    for name, grad in grads.items():
        close = {"rtol": 1e-3, "atol": 1e-5 * factor, "err_msg": name}
        np.testing.assert_allclose(moments[name], 0.1 * factor * grad, **close)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedule_shape(kind):
    options = ScheduleConfig(kind=kind, warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.1)
    config = replace(small_config(JTOK_M, steps=100), schedule=options)
    rates = np.array([schedule(config)(step) for step in range(100)]) / 3e-3
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert np.all(rates <= 1 + 1e-6)
    if kind == "constant":
        np.testing.assert_allclose(rates[10:], 1.0, rtol=1e-6)
    if kind == "wsd":
        np.testing.assert_allclose(rates[10:80], 1.0, rtol=1e-6)
        np.testing.assert_allclose(rates[90], 0.55, rtol=1e-5)
    if kind == "cosine":
        np.testing.assert_allclose(rates[55], 0.55, rtol=1e-5)
    assert (rates[99] < 0.16) == {"cosine": True, "wsd": True, "constant": False}[kind]


def test_deviation_of_the_stream_is_that_of_its_entries():
    """Where no layer adds anything, the embeddings'."""
    params = random_params(DENSE)
    still = {name: 0 * params[name] for name in ("blocks/attention/out", "blocks/ffn/down")}
    embed, ids = 5 + params["embed"], random_ids(DENSE, 4, 16)
    health = bind(DENSE, params | still | {"embed": embed})(ids, with_health=True).health
    assert health["hidden_std"].shape == (3,)
    found = [*health["hidden_std"], health["final_std"]]
    np.testing.assert_allclose(found, [np.std(np.float64(embed)[ids])] * 4, rtol=1e-4)


@pytest.mark.parametrize(("chunk", "scale"), [(0, 1), (1, 1), (4, 1), (7, 1), (100, 1), (4, 20)])
def test_loss_and_its_gradients_equal_those_of_float64(chunk, scale):
    """With padding among the columns of the head, which has neither loss nor gradient.

    Of logits up to hundreds an exponential alone would be infinite.
    """
    rng = np.random.default_rng(0)
    hidden, head = scale * rng.standard_normal((2, 11, 5)), rng.standard_normal((5, 13))
    targets, weights = rng.integers(0, 12, (2, 11)), rng.integers(0, 2, (2, 11))
    options = {"vocab_size": 12, "chunk": chunk, "z_loss": 0.1}

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, jnp.float32(weights), **options)

    grad = jax.value_and_grad(lambda *arrays: 3 * loss(*arrays)[0], argnums=(0, 1))
    mean, (of_hidden, of_head) = jax.jit(grad)(jnp.float32(hidden), jnp.float32(head))
    alone, sums = loss(jnp.float32(hidden), jnp.float32(head))
    logits, is_target = hidden @ head[:, :12], targets[..., None] == np.arange(12)
    lse = scipy.special.logsumexp(logits, axis=-1)
    assert scale == 1 or logits.max() > 100  # e^89 is infinite in float32
    nats, z = (weights * (lse - logits[is_target].reshape(2, 11))).sum(), (weights * lse**2).sum()
    of_logits = np.exp(logits - lse[..., None]) * (1 + 0.2 * lse[..., None]) - is_target
    of_logits = 3 * of_logits * weights[..., None] / weights.sum()
    close = functools.partial(np.testing.assert_allclose, **tolerances.FORWARD["float32"])
    close(sums, [nats, z, weights.sum()])
    close([mean / 3, alone], (nats + 0.1 * z) / weights.sum())
    close(of_hidden, of_logits @ head[:, :12].T)
    close(of_head[:, :12], np.einsum("btd,btv->dv", hidden, of_logits))
    assert not of_head[:, 12].any()


@pytest.mark.parametrize("chunk", [0, 64])
def test_many_tokens_of_one_id_add_up_in_the_gradient_of_a_bfloat16_head(chunk):
    """A sum of thousands of terms in bfloat16 would stop growing."""
    rng, vocab = np.random.default_rng(0), 512
    share = 1 / np.arange(1, vocab + 1)
    targets = rng.choice(vocab, size=(64, 256), p=share / share.sum())
    hidden = jnp.bfloat16(rng.standard_normal((64, 256, 32)) + 0.5)
    head = jnp.float32(jnp.bfloat16(0.02 * rng.standard_normal((32, vocab))))

    def gradient(dtype):
        def loss(head):
            of = {"vocab_size": vocab, "chunk": chunk}
            return cross_entropy(
                hidden.astype(dtype), head, targets, jnp.ones(targets.shape), **of
            )[0]

        return np.asarray(jax.grad(loss)(head))

    exact, found = gradient("float32"), gradient("bfloat16")
    error_V = np.linalg.norm(found - exact, axis=0) / np.linalg.norm(exact, axis=0)
    assert error_V.max() < 0.01, error_V.max()


def test_matmuls_of_the_loss_take_the_compute_dtype_and_add_up_in_float32():
    """As it is traced: a CPU computes all of them in float32 whatever is asked for."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 8, 4), (4, 32))]
    targets, weights = jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8))
    loss = lambda *x: cross_entropy(*x, targets, weights, vocab_size=32, chunk=8)[0]
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes))
    made = re.findall(r":(\w+)\[([\d,]+)\] = dot_general\[", text)
    logits, of_target = ("f32", "8,32"), ("f32", "8")
    assert sorted(made) == sorted([logits, of_target, ("bf16", "8,4"), ("f32", "4,32")])
    narrow = re.findall(r":bf16\[8,32\] = convert_element_type", text)
    assert len(narrow) == 1  # the gradient of the logits


def test_chunked_loss_never_holds_all_logits():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 256, 32), (32, 8192))]
    targets = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def temporaries(chunk):
        def loss(hidden, head, targets):
            ones = jnp.ones(targets.shape)
            of = {"vocab_size": head.shape[1], "chunk": chunk}
            return cross_entropy(hidden, head, targets, ones, **of)[0]

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 256 * 8192 * 4
    assert temporaries(0) >= logits
    assert temporaries(64) < logits / 4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_keeps_every_dtype(accumulation):
    """bfloat16 tables and parameters, float32 moments: what goes in comes out."""
    tables = replace(KINDS["moe-jtok_m"].jtok, table_dtype="bfloat16")
    model = replace(KINDS["moe-jtok_m"], jtok=tables, param_dtype="bfloat16")
    config = small_config(model, grad_accumulation=accumulation)
    state, step, _ = training(config)
    ids = random_ids(model, 4, 16)
    after, _ = jax.eval_shape(step, state, ids, ids)
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(after) == dtypes(state)
    assert state.params["tables"].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} == {"int32", "float32"}


def test_bfloat16_parameters_move_as_float32_ones_do_on_average():
    """A step is a sixth of the last place of an entry of 0.02; norms stay float32."""
    half = replace(KINDS["dense-jtok"], param_dtype="bfloat16")
    moved = {}
    for model in (half, replace(half, param_dtype="float32")):
        config = small_config(model, steps=50)
        rate = replace(config.optimizer, learning_rate=2e-5, weight_decay=0.0)
        config = replace(config, optimizer=rate, schedule=replace(config.schedule, kind="constant"))
        state, step, _ = training(config)
        ids = random_ids(model, 4, 16)
        start = {name: np.float32(value) for name, value in state.params.items()}
        for _ in range(50):
            state, _ = step(state, ids, ids)
        moved[model.param_dtype] = {
            name: np.float32(value) - start[name] for name, value in state.params.items()
        }
    for name in ("embed", "head", "blocks/ffn/gate", "blocks/ffn/norm", "final_norm"):
        rounded, exact = moved["bfloat16"][name], moved["float32"][name]
        slope = np.sum(rounded * exact) / np.sum(exact**2)
        assert 0.8 < slope < 1.2, name
        assert (rounded > 0).any(), name
        assert (rounded < 0).any(), name


def test_routing_is_float32_in_a_bfloat16_model():
    """Logits of a bfloat16 input equal those of the same numbers in float32."""
    rng = np.random.default_rng(0)
    x, router = rng.standard_normal((2, 3, 64)), rng.standard_normal((64, 5))
    x, router = jnp.asarray(x, jnp.bfloat16), jnp.float32(router)
    half = routing.route(x, router, None, top_k=2)
    full = routing.route(x.astype(jnp.float32), router, None, top_k=2)
    np.testing.assert_array_equal(half.probabilities, full.probabilities)
    half, full = (
        moe.route(value.reshape(6, 64), router, top_k=2, renormalize=True)
        for value in (x, x.astype(jnp.float32))
    )
    np.testing.assert_array_equal(half.probabilities_RE, full.probabilities_RE)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_tight_bound_on_ids_trains_alike_and_an_overflow_is_a_bad_step(accumulation):
    ids = random_ids(JTOK_M, 4, 16)
    used = np.unique(ids).size
    results = []
    for bound in (0, used, used - 1):
        config = small_config(JTOK_M, grad_accumulation=accumulation, max_unique_ids=bound)
        state, step, _ = training(config)
        results.append((state, *step(state, ids, ids)))
    (_, plain, _), (_, tight, _), (before, over, metrics) = results
    for name, value in plain.params.items():
        close = {"rtol": 1e-4, "atol": 1e-6, "err_msg": name}
        np.testing.assert_allclose(value, tight.params[name], **close)
    assert metrics.bad_steps == 1
    for name, value in before.params.items():
        np.testing.assert_array_equal(value, over.params[name], err_msg=name)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_padding_of_the_vocabulary_is_inert(head):
    """The same losses; rows that stand for no id are zero before and after steps with decay."""
    plain = replace(JTOK_M, head=head)
    padded = replace(plain, vocab_multiple=16)
    assert (plain.padded_vocab, padded.padded_vocab) == (29, 32)
    tables = TableOptimizerConfig(kind="adamw", weight_decay=0.1)
    runs = []
    for model in (plain, padded):
        config = replace(small_config(model), optimizer=OptimizerConfig(tables=tables))
        state, step, _ = training(config)
        losses = []
        for number in range(3):
            ids = random_ids(plain, 4, 16, seed=number)
            state, metrics = step(state, ids, ids)
            losses.append(float(metrics.loss))
        runs.append((losses, state.params))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-5)
    axis = {"embed": 0, "head": 1, "tables": -2}
    for name in axis.keys() & runs[1][1].keys():
        first, other = (np.moveaxis(run[1][name], axis[name], 0) for run in runs)
        np.testing.assert_allclose(first, other[:29], atol=1e-4)
        np.testing.assert_array_equal(other[29:], 0)
