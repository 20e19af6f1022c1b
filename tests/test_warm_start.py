# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Runs that begin with the parameters of another model, and runs that train tables alone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_oracle import config as hf_config
from hf_oracle import random_tensors, write_folder
from pythons import oldest
from small import (
    ARMS,
    DENSE,
    FREQUENT,
    JTOK,
    JTOK_M,
    small_config,
    small_recipe,
    write_documents,
)
from test_config import changed
from test_data import run_config

from configs.pretrained import get_config
from jtok_jax.arms_config import SconeConfig
from jtok_jax.config import OptimizerConfig
from jtok_jax.config_dict import from_config_dict
from jtok_jax.convert import from_folder
from jtok_jax.errors import CheckpointError, ConfigError, DataError
from jtok_jax.mesh import abstract_mesh
from jtok_jax.model.params import bind, declared, init_params
from jtok_jax.planning.memory import memory
from jtok_jax.prepare import prepare
from jtok_jax.training.saved import load_params
from train import train

pytestmark = oldest
BASE = dataclasses.replace(DENSE, vocab_size=300)
KINDS = {
    "jtok": dataclasses.replace(JTOK, gate_scale_init=0.0),
    "jtok_m": dataclasses.replace(JTOK_M, mixture_scale_init=0.0),
}


def records(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """A finished run of the backbone alone, with its configuration."""
    workdir = tmp_path_factory.mktemp("base")
    config = dataclasses.replace(run_config(corpus, steps=12), model=BASE)
    train(config, workdir)
    return workdir, config


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_a_common_size_starts_as_it_was(kind):
    """Bit for bit, unless XLA for CPUs fuses products into its library: then to their last bits."""
    sizes = {"model_dim": 128, "ffn_dim": 344, "head_dim": 32, "num_layers": 2}
    base = dataclasses.replace(BASE, **sizes)
    model = dataclasses.replace(base, jtok=KINDS[kind])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 300, (4, 256)), jnp.int32)
    params = init_params(model, jax.random.key(0))
    own = {name: params[name] for name in declared(base)}
    run = lambda config, values: bind(config, values)(ids).hidden_BTD
    for unfused, tolerance in ((True, 0), (False, 3e-5)):
        options = {"xla_cpu_experimental_ynn_fusion_type": ""} if unfused else None
        compiled = jax.jit(run, static_argnums=0, compiler_options=options)
        before, after = compiled(base, own), compiled(model, params)
        np.testing.assert_allclose(after, before, rtol=0, atol=tolerance)


def test_words_of_another_tokenizer_are_refused(base, tmp_path):
    """And other text in the same words is taken, in batches of another size."""
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", seed=5)
    recipe = small_recipe(tmp_path / "text")
    prepare(recipe, tmp_path / "other")
    with pytest.raises(DataError, match=r"cut by another tokenizer.*--tokenizer="):
        train(more(base, BASE, **{"data.path": str(tmp_path / "other")}), tmp_path / "run")
    given = {"vocab_size": 0, "tokenizer": str(base[0] / "tokenizer.json")}
    prepare(dataclasses.replace(recipe, **given), tmp_path / "same")
    changes = {"data.path": str(tmp_path / "same"), "train.batch_size": 2, "train.steps": 1}
    train(more(base, BASE, **changes), tmp_path / "run")
    assert records(tmp_path / "run")[0]["val_loss"] < records(base[0])[0]["val_loss"]


def more(base, model, **changes):
    """Return the configuration of a run that begins with `base`."""
    workdir, config = base
    config = dataclasses.replace(config, model=model, init_from=str(workdir))
    return changed(config, changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_tables_added_starts_as_it_was_and_they_train_alone(kind, base, tmp_path):
    """Bit for bit; the backbone has no moments and never moves."""
    model = dataclasses.replace(BASE, jtok=KINDS[kind])
    frozen = {"optimizer.frozen": "backbone", "optimizer.learning_rate": 0.05, "train.steps": 25}
    config = more(base, model, **frozen)
    train(config, tmp_path / "run")
    before, after = load_params(base[0]), load_params(tmp_path / "run")
    losses = [one["val_loss"] for one in records(tmp_path / "run") if "val_loss" in one]
    assert losses[0].hex() == records(base[0])[-1]["val_loss"].hex()
    assert losses[-1] < losses[0]
    for name, one in declared(model).items():
        assert (name in before.params) == (one.owner == "")
        if not one.owner:
            np.testing.assert_array_equal(before.params[name], after.params[name], err_msg=name)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 16)), jnp.int32)
    start = before.params | {
        name: jnp.zeros(one.shape) if name.endswith("scale") else jnp.full(one.shape, 0.3)
        for name, one in declared(model).items()
        if one.owner
    }
    run = jax.jit(lambda model, params: bind(model, params)(ids).hidden_BTD, static_argnums=0)
    np.testing.assert_array_equal(run(BASE, before.params), run(model, start))


def test_what_is_frozen_takes_neither_moments_nor_gradients():
    mesh = abstract_mesh(small_config(DENSE).mesh, 1)
    model = dataclasses.replace(DENSE, jtok=JTOK_M)
    free = small_config(model)
    frozen = dataclasses.replace(free, optimizer=OptimizerConfig(frozen="backbone"))
    size = lambda config, part: sum(
        one.size for one in memory(config, mesh).parts if one.name == part
    )
    backbone = sum(4 * np.prod(one.shape) for one in declared(DENSE).values())
    own = sum(
        4 * np.prod(one.shape) for one in declared(model).values() if one.owner and not one.is_table
    )
    assert size(free, "gradients of the backbone") == backbone + own
    assert size(frozen, "gradients of the backbone") == own
    moments = size(free, "AdamW moments") - size(frozen, "AdamW moments")
    assert moments == pytest.approx(2 * backbone, rel=1e-3)  # and counters


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_alone(arm, base, tmp_path):
    arms = dataclasses.replace(BASE.arms, names=arm, scone=SconeConfig(kind="table"))
    streams = {"ngram": "bigram=2:64", "scone": "frequent=3:119:frequent"}.get(arm, "")
    model = dataclasses.replace(BASE, arms=arms, streams=streams)
    config = more(base, model, **{"optimizer.frozen": "backbone", "train.steps": 3})
    if arm == "scone":
        config = changed(config, {"data.ngrams": f"{config.data.path}/{FREQUENT}"})
    train(config, tmp_path / "run")
    before, after = load_params(base[0]).params, load_params(tmp_path / "run").params
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


def test_a_run_goes_on_without_what_it_began_with(base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base[0], copy)
    config = dataclasses.replace(more(base, BASE), init_from=f"{copy}@12")
    first = changed(config, {"train.steps": 4, "schedule.steps": 8})
    train(first, tmp_path / "run")
    shutil.rmtree(copy)
    train(changed(first, {"train.steps": 8}), tmp_path / "run")
    assert [one["step"] for one in records(tmp_path / "run")] == list(range(9))
    assert records(tmp_path / "run")[1]["loss"] < records(base[0])[1]["loss"] - 0.5


def test_a_folder_of_hugging_face_is_begun_with_as_its_run_is(corpus, tmp_path):
    values = hf_config("qwen2") | {"vocab_size": 300}
    folder = write_folder(tmp_path / "hf", values, random_tensors(values))
    from_folder(folder, tmp_path / "converted")
    losses = []
    for start in (folder, tmp_path / "converted"):
        config = from_config_dict(get_config(str(start)))
        settings = dataclasses.replace(run_config(corpus, steps=3), model=config.model)
        settings = dataclasses.replace(settings, init_from=str(start))
        train(settings, tmp_path / f"run-{start.name}")
        losses.append([one["loss"] for one in records(tmp_path / f"run-{start.name}")[1:]])
    assert losses[0] == losses[1]
    with pytest.raises(CheckpointError, match="holds a model, no run to go on with"):
        train(settings, tmp_path / "converted")


def test_what_does_not_fit_is_named(base, tmp_path):
    wider = dataclasses.replace(BASE, ffn_dim=19)
    with pytest.raises(ConfigError, match=r"ffn/up: \[3, 12, 17\] there, \[3, 12, 19\] here"):
        train(more(base, wider), tmp_path / "a")
    with pytest.raises(ConfigError, match="head: not in this configuration"):
        train(more(base, dataclasses.replace(BASE, head="tied")), tmp_path / "b")
    nothing = dataclasses.replace(more(base, BASE), init_from=str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no checkpoints folder"):
        train(nothing, tmp_path / "c")
    with pytest.raises(ConfigError, match="there is nothing else to train"):
        more(base, BASE, **{"optimizer.frozen": "backbone"})


def test_the_configuration_of_a_run_is_read(base, tmp_path):
    found = from_config_dict(get_config(f"{base[0]}@12"))
    assert found.model == dataclasses.replace(
        BASE, jtok=dataclasses.replace(BASE.jtok, gate_scale_init=0.0, mixture_scale_init=0.0)
    )
    assert found.init_from == f"{base[0]}@12"
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        get_config(str(tmp_path))
