# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Runs that begin with the moments of another one, as it is or grown."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn
from hf_oracle import config as hf_config
from hf_oracle import random_tensors, write_folder
from pythons import oldest
from small import (
    DENSE,
    JTOK_M,
    one_device,
    random_ids,
    small_config,
    training,
    with_every_table,
)
from test_config import changed
from test_data import run_config
from test_train_loop import records

from jtok_jax.config import Config
from jtok_jax.errors import CheckpointError, ConfigError
from jtok_jax.grow import Growth, grow
from jtok_jax.store.tables import HostTables
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.moments import moments_of
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import init_state
from jtok_jax.training.warm_start import begin_with
from train import train

pytestmark = oldest
SLOTS = {"model.pattention.kind": "all", "model.pattention.slots": 10}
SLOTS |= {"model.pattention.ffn_slots": 22, "model.block_norm": "weightless_layer"}
STEADY = {"schedule.kind": "constant", "schedule.warmup_fraction": 0.0}
STEADY |= {"optimizer.tables.weight_decay": 0.1, "optimizer.clip_norm": 0.0}
MODELS = {
    "every table": with_every_table(dataclasses.replace(DENSE, jtok=JTOK_M)),
    "tokenformer": changed(Config(model=DENSE), SLOTS).model,
}


def trained(model, steps: int, **fields):
    """(configuration, state, what makes steps from it), some steps into a run."""
    config = changed(small_config(model), STEADY | fields)
    state, step, _ = training(config)
    for number in range(steps):
        state = step(state, *batch(model, number))[0]
    return config, state, step


def batch(model, number: int) -> tuple[jax.Array, jax.Array]:
    ids = random_ids(model, 4, 17, seed=number)
    return ids[:, :-1], ids[:, 1:]


def saved(folder, config, state) -> None:
    (folder / "config.json").parent.mkdir(parents=True)
    checkpoints = Checkpoints(folder, config, data={"tokenizer": "none"})
    checkpoints.save(state, int(state.step))
    checkpoints.close()


def begun(folder, config):
    """(state, step) of a run that begins with the parameters and the moments of another."""
    config = dataclasses.replace(config, init_from=str(folder), init_moments=True)
    fresh, step, _ = training(config)
    return begin_with(config, one_device(), fresh, None, print), step


@pytest.mark.parametrize("name", MODELS)
def test_the_next_steps_are_those_the_run_would_have_taken(name, tmp_path):
    """At a steady rate. Taken twice, as one run after another would; by every row optimizer."""
    kinds = "ngram.kind=rowwise_adam, deep_embed.kind=rowwise_adagrad" * (name != "tokenformer")
    config, state, step = trained(MODELS[name], 4, **{"optimizer.tables.overrides": kinds})
    for folder in (tmp_path / "one", tmp_path / "two"):
        saved(folder, config, state)
        other, other_step = begun(folder, config)
        assert int(other.step) == 0
        for number in (7, 8):
            state, metrics = step(state, *batch(config.model, number))
            other, found = other_step(other, *batch(config.model, number))
            np.testing.assert_allclose(found.loss, metrics.loss, rtol=1e-6)
        for key, value in state.params.items():
            np.testing.assert_allclose(other.params[key], value, atol=2e-6, err_msg=key)
        config = dataclasses.replace(config, init_from=str(folder), init_moments=True)
        state, step = other, other_step


def test_what_is_new_counts_its_own_steps():
    """Slots with four steps, beside some with none, move as each would by Adam alone."""
    model = MODELS["tokenformer"]
    config = dataclasses.replace(
        changed(small_config(model), STEADY | {"optimizer.weight_decay": 0.0}),
        init_from="somewhere", init_moments=True,
    )  # fmt: skip
    optimizer, options = make_optimizer(config).backbone, config.optimizer
    params = jax.tree.map(jnp.zeros_like, training(small_config(model))[0].params)
    name, old, rng = "blocks/ffn/map/key", slice(15), np.random.default_rng(0)
    grads = [rng.standard_normal(params[name].shape).astype(np.float32) for _ in range(7)]

    def alone(grads, slots):
        adam = optax.adam(options.learning_rate, options.b1, options.b2, options.eps)
        value = jnp.zeros_like(params[name])[:, slots]
        state = adam.init(value)
        for grad in grads:
            updates, state = adam.update(grad[:, slots], state)
            value += updates
        return value, state[0]

    def begin(path, leaf):
        if jax.tree_util.DictKey(name) not in path:
            return leaf
        start = getattr(before, path[-1].name)
        return leaf.at[:, old].set(start)

    first, before = alone(grads[:4], old)
    state = jax.tree_util.tree_map_with_path(begin, optimizer.init(params))
    params[name] = params[name].at[:, old].set(first)
    for grad in grads[4:]:
        of_all = jax.tree.map(jnp.zeros_like, params) | {name: jnp.asarray(grad)}
        updates, state = optimizer.update(of_all, state, params)
        params = optax.apply_updates(params, updates)
    new = slice(15, None)
    for slots, expected in ((old, alone(grads, old)), (new, alone(grads[4:], new))):
        np.testing.assert_allclose(params[name][:, slots], expected[0], atol=1e-6)


GROWTHS = {
    "slots": ("tokenformer", Growth(slots=14, ffn_slots=30)),
    "tables": ("every table", Growth(jtok_tables=7)),
    "tokens": ("every table", Growth(vocab_size=41)),
    "layers": ("every table", Growth(jtok_layers="all")),
}


@pytest.mark.parametrize("name", GROWTHS)
def test_a_grown_run_goes_on_with_the_old_moments_and_none_for_the_new(name, tmp_path):
    """Old entries move as they would have; new ones by a learning rate, as in a first step."""
    kind, growth = GROWTHS[name]
    model = MODELS[kind]
    if name == "layers":
        model = dataclasses.replace(model, jtok=dataclasses.replace(model.jtok, layers="0,2"))
    config, state, step = trained(model, 4, **{"optimizer.weight_decay": 0.0})
    saved(tmp_path / "run", config, state)
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    larger = grow(str(tmp_path / "run"), tmp_path / "grown", growth, moments=True).model
    start, grown_step = begun(tmp_path / "grown", dataclasses.replace(config, model=larger))
    before, after = moments_of(state), moments_of(start)
    for key, leaves in before.items():
        for leaf in ("mu", "nu", "m", "v"):
            if leaf in leaves and not (name == "layers" and key == "tables"):
                old, new = np.asarray(leaves[leaf]), np.array(after[key][leaf])
                there = tuple(slice(size) for size in old.shape)
                np.testing.assert_array_equal(new[there], old, err_msg=f"{key} {leaf}")
                new[there] = 0
                assert not new.any()
    ids = batch(model, 9)
    expected, _ = step(state, *ids)
    found, _ = grown_step(start, *ids)
    for key, value in expected.params.items():
        if name == "layers" and (key == "tables" or key.startswith("blocks/jtok/")):
            continue
        there = tuple(slice(size) for size in value.shape)
        delta = np.array(found.params[key] - start.params[key])
        if name != "tokens" and not key.startswith("arms/"):
            np.testing.assert_allclose(
                delta[there], value - state.params[key], rtol=0.02, atol=6e-5, err_msg=key
            )
    moved, new = {
        "slots": ("blocks/ffn/map/key", np.s_[:, 22:]),
        "tables": ("tables", np.s_[:, 5:]),
        "tokens": ("head", np.s_[:, 29:]),
        "layers": ("blocks/jtok/scale", np.s_[1]),
    }[name]
    rate = config.optimizer.learning_rate * (10 if moved == "tables" else 1)
    sizes = np.abs(np.asarray(found.params[moved] - start.params[moved])[new])
    assert (sizes > 0).any(axis=-1).mean() > 0.5  # of tables, the rows of this batch
    np.testing.assert_allclose(sizes[sizes > 0], rate, rtol=1e-2)


def test_tables_in_host_memory_take_them_too(corpus, tmp_path):
    """From either place, into either: the same losses, and after a resume too."""
    start = run_config(corpus, steps=4)
    model = dataclasses.replace(start.model, jtok=JTOK_M)
    start = changed(dataclasses.replace(start, model=model), STEADY)
    for place in ("device", "host"):
        train(changed(start, {"mesh.table_memory": place}), tmp_path / place)

    def losses(first: str, then: str) -> list[float]:
        config = dataclasses.replace(start, init_from=str(tmp_path / first), init_moments=True)
        config = changed(config, {"mesh.table_memory": then, "train.steps": 3})
        folder = tmp_path / f"{first} {then}"
        if first == then == "host":
            train(changed(config, {"train.steps": 2, "schedule.steps": 3}), folder)
        train(config, folder)
        return [one["loss"] for one in records(folder)[1:]]

    expected = losses("device", "device")
    others = ("device", "host"), ("host", "device"), ("host", "host")
    for places in drawn([*others], 2):
        np.testing.assert_allclose(losses(*places), expected, rtol=1e-6)


def test_every_leaf_of_a_grown_run_wherever_it_lies(tmp_path):
    """Random states, with bad steps; more tokens, beyond those padded, and more tables."""
    jtok = dataclasses.replace(JTOK_M, num_tables=4)
    model = dataclasses.replace(DENSE, jtok=jtok, vocab_multiple=8)
    config = changed(small_config(model), STEADY)
    state, _, _ = training(config)
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.integers(1, 6, x.shape) * 0.75, x.dtype)
    state = state._replace(
        step=jnp.int32(7), bad_steps=jnp.int32(2), opt_state=jax.tree.map(draw, state.opt_state)
    )
    saved(tmp_path / "run", config, state)
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    growth = Growth(vocab_size=41, jtok_tables=6)
    larger = grow(str(tmp_path / "run"), tmp_path / "grown", growth, moments=True).model
    start, _ = begun(tmp_path / "grown", dataclasses.replace(config, model=larger))
    found, before = jax.device_get((start.opt_state, state.opt_state))
    rows, old = found["tables"], before["tables"]
    there, is_new = np.s_[:, :4, :29], np.ones((3, 6, larger.padded_vocab), bool)
    is_new[there] = False
    for leaf in ("m", "v", "m_weight", "v_weight"):
        np.testing.assert_array_equal(rows[leaf][there], old[leaf][:, :, :29], err_msg=leaf)
        assert not rows[leaf][is_new].any()
    np.testing.assert_array_equal(rows["touched"][there], old["touched"][:, :, :29] - 5)
    np.testing.assert_array_equal(rows["decayed"][there], old["decayed"][:, :, :29])
    assert (rows["decayed"][is_new] == old["log_decay"]).all()  # so they decay from now on
    assert rows["log_decay"] == old["log_decay"]
    adam = found["backbone"].inner_states["matrices"].inner_state[0]["embed"]
    expected = before["backbone"].inner_states["matrices"].inner_state[0]
    np.testing.assert_array_equal(adam.mu[:29], expected.mu["embed"][:29])
    assert not adam.mu[29:].any()
    assert adam.count.ravel().tolist() == [int(expected.count)] * 29 + [0] * (len(adam.mu) - 29)
    config = dataclasses.replace(
        changed(config, {"mesh.table_memory": "host"}),
        model=larger, init_from=str(tmp_path / "grown"), init_moments=True,
    )  # fmt: skip
    optimizer, mesh = make_optimizer(config), one_device()
    tables = HostTables(config, mesh, optimizer.rows)
    tables.initialise()
    begin_with(config, mesh, init_state(config, optimizer, mesh), tables, print)
    hosted = tables.by_name()
    for leaf in ("m", "v", "m_weight", "v_weight", "touched", "decayed"):
        (region,) = hosted[f"opt_state/tables/{leaf}"].regions.values()
        np.testing.assert_array_equal(region, rows[leaf], err_msg=leaf)


def test_what_has_no_moments_or_others_is_refused(corpus, tmp_path):
    start = run_config(corpus, steps=1)
    start = dataclasses.replace(start, model=dataclasses.replace(start.model, jtok=JTOK_M))
    train(start, tmp_path / "run")
    more = dataclasses.replace(start, init_from=str(tmp_path / "run"), init_moments=True)
    kinds = ("rowwise_adam", 0.0), ("rowwise_adagrad", 0.0), ("lazy_adam", 0.1)
    for (kind, decay), place in drawn([*itertools.product(kinds, ("device", "host"))], 2):
        fields = {"optimizer.tables.kind": kind, "optimizer.tables.weight_decay": decay}
        with pytest.raises(ConfigError, match="the optimizer of tables was another"):
            train(changed(more, fields | {"mesh.table_memory": place}), tmp_path / "after")
    train(changed(start, {"optimizer.tables.weight_decay": 0.1}), tmp_path / "decays")
    without = dataclasses.replace(more, init_from=str(tmp_path / "decays"))
    with pytest.raises(ConfigError, match="the optimizer of tables was another"):
        train(without, tmp_path / "after")
    with pytest.raises(ConfigError, match=r"b2 is 0\.999 and was 0\.95 in the other run"):
        train(changed(more, {"optimizer.b2": 0.999}), tmp_path / "after")
    grow(str(tmp_path / "run"), tmp_path / "grown", Growth(vocab_size=310))
    model = dataclasses.replace(start.model, vocab_size=310)
    with pytest.raises(CheckpointError, match="holds no moments: it was grown without"):
        train(dataclasses.replace(more, model=model, init_from=str(tmp_path / "grown")),
              tmp_path / "after")  # fmt: skip
    with pytest.raises(ConfigError, match="is adamw, whose rows have no clocks"):
        train(changed(more, {"optimizer.tables.kind": "adamw"}), tmp_path / "after")
    with pytest.raises(ConfigError, match="init_from names no run"):
        dataclasses.replace(more, init_from="")
    values = hf_config("qwen2") | {"vocab_size": 300}
    folder = write_folder(tmp_path / "hf", values, random_tensors(values))
    with pytest.raises(ConfigError, match="is of Hugging Face, and has none"):
        train(dataclasses.replace(more, init_from=str(folder)), tmp_path / "after")
