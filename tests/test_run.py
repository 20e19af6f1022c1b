# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What a run times, and which of its checkpoints it keeps."""

import ast
import dataclasses
import json
import math
import re
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from orbax.checkpoint import v1 as ocp
from pythons import oldest
from small import KINDS
from test_config import changed
from test_data import run_config

from jtok_jax.errors import CheckpointError, ConfigError
from jtok_jax.hosts import Hosts
from jtok_jax.training import run as run_module
from jtok_jax.training import steps as steps_module
from jtok_jax.training.evaluate import Validation
from jtok_jax.training.saved import load_params
from train import train

pytestmark = oldest
TRAINING = sorted((ROOT / "jtok_jax" / "training").glob("*.py"))


@pytest.fixture(scope="module")
def config(corpus):
    start = run_config(corpus, steps=8)
    return dataclasses.replace(start, model=dataclasses.replace(KINDS["dense"], vocab_size=300))


@jax.jit
def much_work(number: jax.Array) -> jax.Array:
    """Return zero, after half a second or so."""
    matrix = jnp.full((400, 400), number)
    return 0 * jax.lax.fori_loop(0, 300, lambda _, x: jnp.tanh(x @ x), matrix).sum()


def test_steps_are_compiled_before_the_loop_and_timed_without_their_health(
    config, tmp_path, monkeypatch
):
    """And the time left is not told before two steps were timed."""
    real = steps_module.make_health_step

    def slow(config, mesh):
        step = real(config, mesh)

        def wrapped(params, ids):
            health = step(params, ids)
            return health | {"slow": much_work(health["final_std"])}

        return wrapped

    counts, told = [], []
    listener = lambda name, *_, **__: counts.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    monkeypatch.setattr(steps_module, "make_health_step", slow)
    monkeypatch.setattr(Hosts, "say", lambda _, text: told.append((text, len(counts))))
    train(changed(config, {"train.log_every": 1, "evaluation.every": 100}), tmp_path)

    texts = [text for text, _ in told]
    start = texts.index("compiling the step ...")
    assert re.fullmatch(r"compiled the step in \d+\.\d s", texts[start + 1])
    (validation, compiled), *steps = [one for one in told[start:] if one[0].startswith("step ")]
    assert validation.startswith("step 0: validation loss")
    assert [count for _, count in steps[:8]] == [compiled] * 8
    assert [" left" in text for text, _ in steps[:8]] == [False] + 7 * [True]
    much_work(1.0).block_until_ready()
    began = time.perf_counter()
    much_work(1.0).block_until_ready()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]
    seconds = sorted(json.loads(line)["step_seconds"] for line in lines)
    assert seconds[4] < (time.perf_counter() - began) / 2


def test_the_best_checkpoint_survives_though_it_is_early(config, tmp_path, monkeypatch):
    """Also over a restart; neither a loss that is not finite nor a missing one counts."""
    losses = iter([0.1, 1.0, math.nan, 3.0, 2.0])  # of steps 0, 2, 4, 5 and 7; 0 is not saved
    monkeypatch.setattr(run_module, "evaluate", lambda *_, **__: Validation(next(losses), 0.0))
    changes = {"checkpoint.keep": 1, "checkpoint.keep_best": 1, "checkpoint.every": 1}
    changes |= {"evaluation.every": 2, "schedule.steps": 8}
    for steps, kept in ((5, [2, 5]), (7, [2, 7])):
        train(changed(config, changes | {"train.steps": steps}), tmp_path)
        assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept
        changes["evaluation.every"] = 100
    found = [load_params(tmp_path, step=step).step for step in ("newest", "best", "2")]
    assert found == [7, 2, 2]
    with pytest.raises(CheckpointError, match=r"'6' in .*; there are 2 \(validated\), 7 \(val"):
        load_params(tmp_path, step="6")


def test_checkpoints_of_every_third_step_are_kept(config, tmp_path):
    changes = {"checkpoint.keep": 1, "checkpoint.every": 1, "checkpoint.keep_every": 3}
    train(changed(config, changes | {"train.steps": 7, "schedule.steps": 8}), tmp_path)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [3, 6, 7]
    with pytest.raises(ConfigError, match=r"keep_every is 3; expected a multiple of .*every, 2"):
        changed(config, {"checkpoint.every": 2, "checkpoint.keep_every": 3})


def test_a_device_without_memory_is_no_damaged_checkpoint(config, tmp_path, monkeypatch):
    """Nobody is told to move a checkpoint away that is sound."""
    train(changed(config, {"train.steps": 2, "schedule.steps": 8}), tmp_path)

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp.training.Checkpointer, "load", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        load_params(tmp_path)


def test_some_steps_are_traced(config, tmp_path):
    train(changed(config, {"profile.steps": "3:4", "train.steps": 6}), tmp_path)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    train(changed(config, {"profile.steps": "2:99", "train.steps": 4}), tmp_path / "to_the_end")
    assert list((tmp_path / "to_the_end" / "profile").rglob("*.xplane.pb"))
    for text in ("3", "0:4", "a:b", "3:4:5"):
        with pytest.raises(ConfigError, match="expected FIRST:LAST as 10:15"):
            changed(config, {"profile.steps": text})


def test_a_run_and_what_goes_on_with_it_are_one_run_of_wandb(config, tmp_path, monkeypatch):
    told, logged = [], {}
    ours = types.SimpleNamespace(
        log=lambda values, step: logged.setdefault(step, {}).update(values), finish=lambda: None
    )
    wandb = types.SimpleNamespace(init=lambda **options: told.append(options) or ours)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in (2, 4):
        changes = {"logging.wandb": "tables", "train.steps": steps, "schedule.steps": 4}
        train(changed(config, changes), tmp_path)
    first, second = told
    assert first["id"] == second["id"]
    assert (first["project"], first["resume"]) == ("tables", "allow")
    assert first["config"]["model"]["vocab_size"] == 300
    assert sorted(logged) == [0, 1, 2, 3, 4]
    assert {"loss", "val_loss", "step_seconds"} < logged[4].keys()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is set but wandb is not installed; pip install"):
        train(changed(config, changes), tmp_path / "other")


def test_checkpoints_that_are_never_ranked_are_refused(config):
    changes = {"checkpoint.every": 4, "evaluation.every": 6}
    changed(config, changes)
    with pytest.raises(ConfigError, match=r"every is 4, evaluation.every 6\. Make one a multiple"):
        changed(config, changes | {"checkpoint.keep_best": 1})


def late_attributes(path) -> list[tuple[str, str]]:
    """Return (class, attribute) of what a method sets and `__init__` does not."""

    def stored(method):
        attributes = [node for node in ast.walk(method) if isinstance(node, ast.Attribute)]
        own = [
            x for x in attributes if isinstance(x.ctx, ast.Store) and ast.unparse(x.value) == "self"
        ]
        return {attribute.attr for attribute in own}

    found = []
    for kind in ast.walk(ast.parse(path.read_text())):
        if isinstance(kind, ast.ClassDef):
            methods = {x.name: stored(x) for x in kind.body if isinstance(x, ast.FunctionDef)}
            first = methods.pop("__init__", set())
            found += [(kind.name, name) for names in methods.values() for name in names - first]
    return found


@pytest.mark.parametrize("path", [ROOT / "jtok_jax" / "hosts.py", *TRAINING], ids=lambda x: x.name)
def test_attributes_are_set_in_init(path):
    assert not late_attributes(path)
