# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A run that goes on with another rate, schedule or batch, when told so."""

import json
import shutil

import numpy as np
import pytest
from pythons import oldest
from test_config import changed
from test_train_loop import config, records

from jtok_jax.data.loader import open_source
from jtok_jax.errors import ConfigError
from jtok_jax.training import run as run_module
from train import train

__all__ = ["config"]  # a fixture
pytestmark = oldest

ALLOWED = {"train.allow_changes": "optimizer.learning_rate,schedule,train"}
DECAY = {
    "train.steps": 14, "schedule.steps": 14, "schedule.kind": "wsd", "schedule.decay_fraction": 0.3,
    "optimizer.learning_rate": 1e-3, "train.batch_size": 2, "train.grad_accumulation": 2,
}  # fmt: skip


@pytest.fixture
def read(monkeypatch) -> list:
    """The batches that runs of this test read."""
    found, real = [], run_module.train_batches

    def reading(*arguments, **options):
        for batch in real(*arguments, **options):
            found.append(batch)
            yield batch

    monkeypatch.setattr(run_module, "train_batches", reading)
    return found


def test_a_run_goes_on_with_another_rate_and_batch_and_says_so(config, workdir, read, capsys):
    """It was trained for 11 steps of 4 sequences; 3 steps of 2 follow them."""
    new = changed(config, DECAY)
    with pytest.raises(ConfigError, match=r"(?s)batch_size: 4 in the run, 2 now.*allow_changes="):
        train(new, workdir)
    with pytest.raises(ConfigError, match=r"batch_size: 4 in the run, 2 now"):
        train(changed(new, {"train.allow_changes": "schedule,optimizer.learning_rate"}), workdir)
    train(changed(new, ALLOWED), workdir)
    said = "changed: optimizer.learning_rate: 0.003 in the run, 0.001 now"
    assert said in capsys.readouterr().out
    (entry,) = json.loads((workdir / "history.json").read_text())
    assert entry["after_step"] == 11
    assert {line.partition(":")[0] for line in entry["changes"]} == DECAY.keys() - {"train.steps"}
    order = open_source(changed(config, {"train.batch_size": 2}))
    wanted = [order.sequences(22 + step) for step in (1, 2, 3)]
    np.testing.assert_array_equal([_sequences(one) for one in read], wanted)


def _sequences(batch) -> np.ndarray:
    return np.concatenate([batch.ids_BT, batch.targets_BT[:, -1:]], axis=1)


def test_a_changed_run_that_is_stopped_equals_one_that_is_not(config, workdir, tmp_path):
    """The change is a part of the run: the same command, and one without the flag, go on."""
    new = changed(config, DECAY | ALLOWED | {"train.steps": 20, "schedule.steps": 20})
    alone = shutil.copytree(workdir, tmp_path / "alone")
    train(new, alone)
    train(changed(new, {"checkpoint.every": 1, "checkpoint.keep": 9}), workdir)
    for step in range(14, 21):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    train(changed(new, {"train.allow_changes": ""}), workdir)
    for left, right in zip(records(alone), records(workdir), strict=True):
        assert left["step"] == right["step"]
        assert left.get("loss") == right.get("loss")
        assert left.get("batch_hash") == right.get("batch_hash")
    history = [json.loads((one / "history.json").read_text()) for one in (alone, workdir)]
    assert len(history[0]) == 1
    assert history[0] == history[1]


@pytest.mark.parametrize(("field", "value"), [
    ("train.seed", 1), ("train.seq_len", 8), ("model.norm_eps", 1e-5), ("optimizer.b1", 0.8),
    ("optimizer.tables.kind", "rowwise_adam"), ("optimizer.frozen", "backbone"),
    ("optimizer.tables.weight_decay", 0.1),
])  # fmt: skip
def test_what_a_run_is_cannot_change(config, workdir, field, value):
    before = (workdir / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"belongs to a run with another configuration"):
        train(changed(config, ALLOWED | {"train.steps": 12, field: value}), workdir)
    assert (workdir / "config.json").read_text() == before
    with pytest.raises(ConfigError, match=rf"allow_changes names '{field}'; a run can change"):
        changed(config, {"train.allow_changes": field})


def test_random_sequences_depend_on_the_batch(config, tmp_path):
    start = changed(config, ALLOWED | {"data.source": "synthetic", "data.path": ""})
    start = changed(start, {"train.steps": 1, "schedule.steps": 2})
    train(start, tmp_path)
    with pytest.raises(ConfigError, match=r"batch_size: 4 in the run, 2 now"):
        train(changed(start, {"train.steps": 2, "train.batch_size": 2}), tmp_path)


def test_a_change_that_fails_leaves_the_run_as_it_was(config, workdir, monkeypatch):
    """Both the old command and the new one go on."""
    new = changed(config, ALLOWED | {"train.steps": 12, "schedule.steps": 11})
    new = changed(new, {"optimizer.learning_rate": 1e-3})
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "compile", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(new, workdir)
    assert not (workdir / "history.json").exists()
    other = shutil.copytree(workdir, workdir.with_name("other"))
    train(changed(new, {"optimizer.learning_rate": 3e-3, "train.allow_changes": ""}), workdir)
    assert not (workdir / "history.json").exists()
    before = (other / "config.json").read_text()
    train(new, other)
    after = (other / "config.json").read_text()
    assert after != before
    (other / "config.json").write_text(before)  # as a kill right after the save leaves it
    train(new, other)
    assert (other / "config.json").read_text() == after
    assert json.loads((other / "history.json").read_text())[0]["after_step"] == 11
