# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A study as a user runs it, and what it refuses; arithmetic of its report."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from pythons import oldest

from jtok_jax.errors import ConfigError, DataError
from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.report import estimate, paired, write_report
from jtok_jax.study.results import Result, Table, measured
from jtok_jax.study.run import finished, run_study
from jtok_jax.study.spec import cells, expand, going_on, identity, load_study, resolve, start
from jtok_jax.study.trainer import Places, StudyError

pytestmark = oldest
RATE = "optimizer.tables.learning_rate_multiplier"
COMMON = {
    "model.vocab_size": 64, "model.model_dim": 16, "model.num_layers": 1, "model.num_heads": 2,
    "model.num_kv_heads": 2, "model.compute_dtype": "float32", "train.batch_size": 4,
    "train.seq_len": 16, "data.source": "synthetic", "evaluation.batch_size": 4,
    "checkpoint.every": 20,
}  # fmt: skip
ARMS = (Arm("dense", "configs/arms/dense.py"), Arm("bigram", "configs/arms/bigram.py"))
STUDY = Study("Does it?", COMMON, ARMS, (Stage(steps=600, seeds=(0, 1)),))
FILE = f"""
from jtok_jax.study import Arm, Stage, Study

def get_study():
    return {STUDY!r}
"""


def first_cells(study: Study):
    return cells(study, study.stages[0], expand(start(study), study.stages[0]))


def filled(folder: pathlib.Path, study: Study, losses: dict[str, float]) -> Places:
    """The table of a study whose runs all ended at the loss of their arm, plus a tenth a seed."""
    table = Table(folder)
    for cell in first_cells(study):
        loss = losses[cell.candidate.arm.name] + cell.seed / 10
        records = [{"step": s, "loss": loss, "step_seconds": 0.5} for s in range(1, cell.steps + 1)]
        records[-1] |= {"val_loss": loss, "val_bpb": loss / 3}
        config = resolve(cell, ROOT)
        result, curve = measured(cell, config, records, device="d", data="x", commit="c")
        table.add(result, config, curve)
    return Places(ROOT, folder / "runs", folder)


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    """Killed in its second run; nothing finished is trained again."""
    file, runs = tmp_path / "killed.py", tmp_path / "runs"
    file.write_text(FILE)
    command = [sys.executable, "-m", "jtok_jax.study", "run", f"--study={file}", f"--runs={runs}",
               f"--results={tmp_path}"]  # fmt: skip
    second = runs / first_cells(STUDY)[1].key / "metrics.jsonl"
    with (tmp_path / "console.txt").open("w") as console:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=console, stdout=console, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not (second.exists() and second.read_text().count("\n") > 100):
            assert time.monotonic() < deadline, (tmp_path / "console.txt").read_text()
            assert process.poll() is None, (tmp_path / "console.txt").read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = (tmp_path / "cells.csv").read_text()
    assert before.count("\n") == 2
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    after = (tmp_path / "cells.csv").read_text()
    assert after.startswith(before)
    assert after.count("\n") == 5
    assert "resumed at step" in second.with_name("console.txt").read_text()
    assert "100%" in done.stderr
    text = write_report(load_study(str(file)), Places(ROOT, runs, tmp_path), "killed")
    assert text.count("600 steps") == 0
    assert "| dense |  | 2 |" in text
    for name in ("killed.md", "killed-curves.svg", "killed-cost.svg"):
        assert (tmp_path / name).stat().st_size > 500


def test_a_failed_run_is_reported_and_the_rest_go_on(tmp_path, capsys):
    bad = Arm("bad", "configs/arms/jtok.py", {"model.jtok.implementation": "mosaic_gpu"})
    study = dataclasses.replace(STUDY, arms=(bad, ARMS[0]), stages=(Stage(steps=5),))
    places = Places(ROOT, tmp_path / "runs", tmp_path / "results")
    with pytest.raises(StudyError, match="1 of the study's runs failed"):
        run_study(study, places, keep_checkpoints=False)
    told = capsys.readouterr()
    assert "FAILED bad, 5 steps, seed 0: exit code 2" in told.err
    assert "the device is a cpu; 'xla' can" in told.err
    (line,) = (places.results / "cells.csv").read_text().splitlines()[1:]
    assert ",dense,{},5,0,finished," in line
    assert not list(places.runs.glob("*/checkpoints"))


def test_the_best_go_on_and_finished_runs_serve_later_stages():
    stages = (
        Stage(10, vary={"model.init_std": (0.1, 0.2, 0.3), f"bigram:{RATE}": (1.0, 3.0)}, keep=2),
        Stage(10, vary={f"bigram:{RATE}": (3.0, 9.0)}, keep=1),
        Stage(20, seeds=(0, 1)),
    )
    study = dataclasses.replace(STUDY, stages=stages)
    first = expand(start(study), stages[0])
    assert {name: len(some) for name, some in first.items()} == {"dense": 3, "bigram": 6}
    best = {name: going_on(some[::-1], stages[0]) for name, some in first.items()}
    assert [one.name for one in best["bigram"]] == [
        "bigram init_std=0.3 learning_rate_multiplier=3",
        "bigram init_std=0.3 learning_rate_multiplier=1",
    ]
    second = expand(best, stages[1])
    keys = lambda stage, some: {cell.key for cell in cells(study, stage, some)}
    assert len(keys(stages[1], second) & keys(stages[0], first)) == 3  # dense 2, bigram at 3.0
    last = expand({name: going_on(some, stages[1]) for name, some in second.items()}, stages[2])
    assert [(c.seed, c.candidate.arm.name) for c in cells(study, stages[2], last)] == [
        (0, "dense"), (0, "bigram"), (1, "dense"), (1, "bigram"),
    ]  # fmt: skip


@pytest.mark.parametrize(("arm", "message"), [
    ({"train.batch_size": 8}, "train.batch_size: 4 in dense, .* 8 in bigram"),
    ({"model.vocab_size": 32}, "model.vocab_size"),
    ({"evaluation.batch_size": 2}, "evaluation.batch_size"),
    ({"data.path": "elsewhere"}, "data.path"),
    ({"model.vocabsize": 3}, "there is no field 'model.vocabsize'"),
    ({"train.seq_len": "long"}, "bigram, 600 steps, seed 0"),
    ({"model.num_heads": 5}, "not a multiple of model.num_heads"),
])  # fmt: skip
def test_arms_that_cannot_be_compared_are_refused(arm, message, tmp_path):
    arms = (ARMS[0], dataclasses.replace(ARMS[1], fields=arm))
    study = dataclasses.replace(STUDY, arms=arms)
    with pytest.raises(ConfigError, match=message):
        run_study(study, Places(ROOT, tmp_path, tmp_path), keep_checkpoints=False)
    assert not list(tmp_path.iterdir())


def test_a_changed_configuration_under_a_finished_run_is_refused(tmp_path):
    places = filled(tmp_path, STUDY, {"dense": 3.0, "bigram": 2.5})
    configs = tmp_path / "configs.json"
    configs.write_text(configs.read_text().replace('"optimizer.b1": 0.9', '"optimizer.b1": 0.8'))
    with pytest.raises(ConfigError, match=r"dense, .*\n  optimizer.b1: 0.8 in the table, 0.9 now"):
        finished(STUDY, places)


def test_other_data_under_a_finished_run_are_refused(tmp_path):
    places = filled(tmp_path, STUDY, {"dense": 3.0, "bigram": 2.5})
    with pytest.raises(DataError, match="Losses on different texts cannot be compared"):
        run_study(STUDY, places, keep_checkpoints=False)


def test_a_report_needs_all_runs(tmp_path):
    places = filled(tmp_path, STUDY, {"dense": 3.0, "bigram": 2.5})
    longer = dataclasses.replace(STUDY, stages=(Stage(steps=600, seeds=(0, 1, 2)),))
    with pytest.raises(ConfigError, match=r"2 runs are not in .*dense, 600 steps, seed 2"):
        write_report(longer, places, "x")


def test_reports_tell_means_and_differences_seed_by_seed(tmp_path):
    """Seeds differ by a tenth, the arms by half at every seed."""
    text = write_report(STUDY, filled(tmp_path, STUDY, {"dense": 3.0, "bigram": 2.5}), "x")
    assert "| 2.5500 +- 0.6353 | -0.5000 +- 0.0000 |" in text  # t(0.975, 1) = 12.706
    assert "| 3.0500 +- 0.6353 |  |" in text


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [estimate(list(rng.normal(2.0, 0.3, 3))) for _ in range(2000)]
    covered = np.mean([abs(mean - 2.0) <= half for mean, half in found])
    assert abs(covered - 0.95) < 0.02
    assert np.isnan(estimate([1.0]).half)
    assert str(estimate([1.0, np.inf])) == "diverged"


def test_differences_are_taken_between_equal_seeds():
    result = Result("c", "a", "{}", 1, 0, "finished", *[0.0] * 2, *[1] * 4, *[1.0] * 3, "", "", "")
    of = lambda losses: [result._replace(seed=s, val_loss=x) for s, x in losses.items()]
    found = paired(of({0: 1.0, 1: 2.0, 5: 9.0}), of({1: 2.5, 0: 1.4}))
    assert found.mean == pytest.approx(-0.45)


def test_what_is_off_does_not_decide_a_result():
    dense, bigram = (resolve(cell, ROOT) for cell in first_cells(STUDY)[:2])
    assert not any(key.startswith("optimizer.tables") for key in identity(dense))
    assert identity(bigram)[RATE] == 1.0
    assert [key for key in identity(bigram) if key.startswith("model.arms")] == [
        "model.arms.names", "model.arms.bigram.rows_per_id",
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1", "gives no study: KeyError"),
    (FILE.replace("'bigram', config", "'dense', config"), "two arms have one name"),
    (FILE.replace("baseline='dense'", "baseline='base'"), "baseline 'base' is none of dense"),
])  # fmt: skip
def test_files_that_are_no_studies_are_refused(text, message, tmp_path):
    path = tmp_path / "study.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_study(str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.py")), ids=str)
def test_every_study_of_the_repository_can_start(path):
    study = load_study(str(path))
    for cell in first_cells(study):
        assert resolve(cell, ROOT, data="folder").data.path == "folder"
