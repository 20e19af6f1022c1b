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

from jtok_jax import flops
from jtok_jax.arms import ArmsConfig
from jtok_jax.config import JtokConfig, OptimizerConfig
from jtok_jax.errors import ConfigError, DataError, WorkdirError
from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.fit import write_fit
from jtok_jax.study.report import estimate, paired, write_report
from jtok_jax.study.results import Result, Table, measured
from jtok_jax.study.run import finished, last_candidates, run_study
from jtok_jax.study.spec import (
    cells,
    expand,
    identity,
    load_study,
    require_comparable,
    resolve,
    start,
)
from jtok_jax.study.timing import time_candidates
from jtok_jax.study.trainer import Places, Stop, StudyError
from jtok_jax.training.guards import WorkdirLock

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


def fill(folder: pathlib.Path, wanted, losses) -> Places:
    """Lines of the table for runs that ended at losses(cell); None: not finite."""
    table = Table(folder)
    for cell in wanted:
        loss, config = losses(cell), resolve(cell, ROOT)
        records = [{"step": s, "loss": loss, "step_seconds": 0.5} for s in range(1, cell.steps + 1)]
        if loss is not None:
            records[-1] |= {"val_loss": loss, "val_bpb": loss / 3}
        result, curve = measured(cell, config, records, device="d", data="x", commit="c")
        table.add(result, config, curve)
    return Places(ROOT, folder / "runs", folder)


def filled(folder: pathlib.Path, losses: dict[str, float]) -> Places:
    """All runs of STUDY at the loss of their arm, plus a tenth a seed."""
    return fill(folder, first_cells(STUDY), lambda c: losses[c.candidate.arm.name] + c.seed / 10)


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
    text = write_report(load_study(str(file)), Places(ROOT, runs, tmp_path), str(file))
    assert "| dense |  | 2 |" in text
    assert "Failed or not yet run" not in text
    for name in ("killed.md", "killed-curves.svg", "killed-cost.svg"):
        assert (tmp_path / name).stat().st_size > 500


def test_a_failed_run_is_reported_and_the_rest_go_on(tmp_path, capsys):
    bad = Arm("bad", "configs/arms/jtok.py", {"model.jtok.implementation": "mosaic_gpu"})
    study = dataclasses.replace(STUDY, arms=(bad, ARMS[0]), stages=(Stage(steps=5),))
    places = Places(ROOT, tmp_path / "runs", tmp_path / "results")
    with pytest.raises(StudyError, match="1 runs failed, see above"):
        run_study(study, places, keep_checkpoints=False)
    told = capsys.readouterr()
    assert "FAILED bad, 5 steps, seed 0: exit code 2" in told.err
    assert "the device is a cpu; 'xla' can" in told.err
    (line,) = (places.results / "cells.csv").read_text().splitlines()[1:]
    assert ",dense,{},5,0,finished," in line
    assert not list(places.runs.glob("*/checkpoints"))


TWO_STAGES = dataclasses.replace(STUDY, stages=(
    Stage(10, vary={"model.init_std": (0.1, 0.2, 0.3), f"bigram:{RATE}": (1.0, 3.0)}, keep=2),
    Stage(10, vary={f"bigram:{RATE}": (3.0, 9.0)}, keep=1),
    Stage(20, seeds=(0, 1)),
))  # fmt: skip


def by_init(cell) -> float | None:
    """Larger initial values are better, then smaller rates; 0.3 at rate 1, dense's, diverges."""
    init, rate = (cell.fields.get(key, 1.0) for key in ("model.init_std", RATE))
    return None if (init, rate) == (0.3, 1.0) else 5 - init + rate / 1000


def test_the_best_go_on_from_stage_to_stage(tmp_path):
    one, two, _ = TWO_STAGES.stages
    first = expand(start(TWO_STAGES), one)
    places = fill(tmp_path, cells(TWO_STAGES, one, first), by_init)
    with pytest.raises(ConfigError, match=r"2 runs are not in .*multiplier=9, 10 steps"):
        last_candidates(TWO_STAGES, places)
    best = {"dense": first["dense"][:0:-1], "bigram": [first["bigram"][i] for i in (5, 2)]}
    second = expand(best, two)
    names = [candidate.name for candidate in second["bigram"]]
    assert names == [f"bigram init_std={i} learning_rate_multiplier={r}"
                     for i in (0.3, 0.2) for r in (3, 9)]  # fmt: skip
    fill(tmp_path, cells(TWO_STAGES, two, second), by_init)
    last = last_candidates(TWO_STAGES, places)
    assert {name: [one.name for one in some] for name, some in last.items()} == {
        "dense": ["dense init_std=0.2"],
        "bigram": ["bigram init_std=0.3 learning_rate_multiplier=3"],
    }


def test_a_candidate_that_comes_up_twice_counts_once():
    one, two, _ = TWO_STAGES.stages
    some = {"bigram": expand(start(TWO_STAGES), one)["bigram"][:2]}  # 0.1 at 1.0 and at 3.0
    assert [c.name.rsplit("=", 1)[1] for c in expand(some, two)["bigram"]] == ["3", "9"]


def test_a_run_that_two_stages_choose_from_is_one_trial(tmp_path):
    arms = ARMS[0], dataclasses.replace(ARMS[1], fields=ARMS[1].fields | {RATE: 3.0})
    stages = (
        Stage(10, vary={"bigram:model.init_std": (0.1, 0.2)}, keep=1),
        Stage(10, vary={f"bigram:{RATE}": (3.0, 9.0)}, keep=1),
        Stage(20),
    )
    study = dataclasses.replace(STUDY, arms=arms, stages=stages)
    best = start(study)
    larger = lambda cell: 15 - sum(cell.fields.get(key, 0.0) for key in ("model.init_std", RATE))
    for stage in stages:  # the last candidate is the best
        candidates = expand(best, stage)
        places = fill(tmp_path, cells(study, stage, candidates), larger)
        best |= {arm: some[-1:] for arm, some in candidates.items()}
    lines = write_report(study, places, "x").splitlines()
    line = next(line for line in lines if line.startswith("| bigram"))
    assert line.endswith("| 3 |")


def test_a_run_that_diverged_comes_last_and_is_told(tmp_path):
    study = dataclasses.replace(STUDY, stages=(Stage(10, vary={f"bigram:{RATE}": (1.0, 3.0)}),))
    wanted = cells(study, study.stages[0], expand(start(study), study.stages[0]))
    places = fill(tmp_path, wanted, lambda c: None if c.fields.get(RATE) == 1.0 else 3.0)
    stages, lacking = finished(study, places)
    assert [one.loss for one in stages[0]["bigram"]] == [3.0, np.inf]
    assert not lacking
    text = write_report(study, places, "x")
    assert "| bigram | learning_rate_multiplier 1 | 1 | diverged | diverged | diverged |" in text


def test_switching_something_on_is_another_configuration(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    (cell,) = [c for c in first_cells(STUDY) if c.seed == 0 and c.candidate.arm.name == "dense"]
    config = resolve(cell, ROOT)
    table = Table(places.results)
    assert table.get(cell, config)
    moe = dataclasses.replace(config.model.moe, num_experts=2)
    for changes in ({"moe": moe}, {"jtok": JtokConfig(kind="jtok")}, {"arms": ArmsConfig("film")}):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        with pytest.raises(ConfigError, match="in the table"):
            table.get(cell, other)


def test_two_studies_add_to_one_table(tmp_path):
    first, second = first_cells(STUDY)[:2]
    tables = Table(tmp_path), Table(tmp_path)
    for table, cell in zip(tables, (first, second), strict=True):
        config = resolve(cell, ROOT)
        records = [{"step": 600, "loss": 1.0, "step_seconds": 1.0, "val_loss": 1.0, "val_bpb": 1.0}]
        table.add(*measured(cell, config, records, device="", data="", commit="")[:1], config, [])
    assert all(Table(tmp_path).get(cell, resolve(cell, ROOT)) for cell in (first, second))


def test_requests_to_stop_are_passed_on_and_kept():
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        process = subprocess.Popen(["sleep", "60"])
        asks = lambda: stop.asked or os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(process, asks) == -signal.SIGTERM
        assert stop.asked
        late = subprocess.Popen(["sleep", "60"])
        assert stop.wait(late, lambda: None) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_left_of_a_killed_study_stops_the_next(tmp_path):
    study = dataclasses.replace(STUDY, stages=(Stage(steps=5),))
    places = Places(ROOT, tmp_path / "runs", tmp_path / "results")
    with (
        WorkdirLock(places.runs / first_cells(study)[0].key),
        pytest.raises(WorkdirError, match=f"in use by a trainer with pid {os.getpid()}"),
    ):
        run_study(study, places, keep_checkpoints=False)


def test_step_times_are_paired_and_used_by_the_report(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    assert "as the runs found the machine" in write_report(STUDY, places, "x.py")
    found = time_candidates(STUDY, places, "x", rounds=3)
    assert "| dense | 1.000 | 1.000 to 1.000 |" in found
    lines = (tmp_path / "x-steps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["candidate", "dense", "bigram"]
    assert "paired over 3 rounds (1 x cpu, " in write_report(STUDY, places, "x.py")


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
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    configs = tmp_path / "configs.json"
    configs.write_text(configs.read_text().replace('"optimizer.b1": 0.9', '"optimizer.b1": 0.8'))
    with pytest.raises(ConfigError, match=r"dense, .*\n  optimizer.b1: 0.8 in the table, 0.9 now"):
        finished(STUDY, places)


def test_other_data_under_a_finished_run_are_refused(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    with pytest.raises(DataError, match="Losses on different texts cannot be compared"):
        run_study(STUDY, places, keep_checkpoints=False)


def test_a_report_tells_which_runs_there_are_none_of(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    longer = dataclasses.replace(STUDY, stages=(Stage(steps=600, seeds=(0, 1, 2)),))
    assert "Failed or not yet run: dense, 600 steps, seed 2; bigram" in (
        write_report(longer, places, "x")
    )
    none = dataclasses.replace(STUDY, stages=(Stage(steps=7),))
    with pytest.raises(ConfigError, match=r"2 runs are not in .*dense, 7 steps, seed 0"):
        write_report(none, places, "x")
    (tmp_path / "configs.json").unlink()
    with pytest.raises(ConfigError, match="lacks the configuration of"):
        write_report(STUDY, places, "x")


def test_reports_tell_means_and_differences_seed_by_seed(tmp_path):
    """Seeds differ by a tenth, the arms by half at every seed."""
    arms = ARMS[0], dataclasses.replace(ARMS[1], tried=7)  # in another study
    study = dataclasses.replace(STUDY, arms=arms)
    text = write_report(study, filled(tmp_path, {"dense": 3.0, "bigram": 2.5}), "x")
    first, second = (line for line in text.splitlines() if "+- 0.6353" in line)
    assert "| 2.5500 +- 0.6353 | -0.5000 +- 0.0000 |" in first  # t(0.975, 1) = 12.706
    assert first.endswith("| 7 |")
    assert "| 3.0500 +- 0.6353 |  |" in second
    assert second.endswith("| 1 |")


SIZES = tuple(
    Arm(f"dense{width}", "configs/arms/dense.py", {"model.ffn_dim": width})
    for width in (64, 80, 96)
)
MIXED = tuple(
    Arm(f"jtok_m {tables}/{used}", "configs/arms/jtok_m.py",
        {"model.jtok.num_tables": tables, "model.jtok.top_k": used, "model.ffn_dim": 64})
    for tables, used in ((2, 1), (4, 1), (4, 2), (8, 8))
)  # fmt: skip


def test_a_fit_finds_the_size_that_an_arm_is_worth(tmp_path):
    """Losses made with gamma = 0.3 eta^-0.5 rho^0.25."""
    study = Study("?", COMMON, SIZES + MIXED, (Stage(steps=5),), baseline="dense64")

    def loss(cell):
        config = resolve(cell, ROOT)
        counts, jtok = flops.count(config.model, seq_len=16), config.model.jtok
        eta, rho = counts.tables / counts.backbone, jtok.top_k / jtok.num_tables
        gain = 1 + 0.3 * eta**0.5 * rho**0.25 if eta else 1
        return 4 * (counts.backbone * gain) ** -0.07

    places = fill(tmp_path, first_cells(study), loss)
    text = write_fit(study, places, "x.py")
    assert "gamma = 0.300 eta^-0.500 rho^0.250, r2 1.000, over 4 candidates" in text
    assert "| jtok_m 4/1 |" in text
    assert "*" in text.split("jtok_m 8/8")[1].split("\n")[0]  # beyond the largest dense
    assert "*" not in text.split("| jtok_m 2/1")[1].split("\n")[0]
    few = dataclasses.replace(study, arms=SIZES[:2] + MIXED)
    with pytest.raises(ConfigError, match=r"has 2 sizes .*; a line through them needs 3"):
        write_fit(few, places, "x.py")


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [estimate(list(rng.normal(2.0, 0.3, 3))) for _ in range(2000)]
    covered = np.mean([abs(mean - 2.0) <= half for mean, half in found])
    assert abs(covered - 0.95) < 0.02
    assert np.isnan(estimate([1.0]).half)
    assert str(estimate([1.0, np.inf])) == "diverged"


def test_differences_are_taken_between_equal_seeds():
    result = Result("c", "a", "{}", 1, 0, "finished", *[0.0] * 2, *[1] * 4, *[1.0] * 3, *[""] * 4)
    of = lambda losses: [result._replace(seed=s, val_loss=x) for s, x in losses.items()]
    found = paired(of({0: 1.0, 1: 2.0, 5: 9.0}), of({1: 2.5, 0: 1.4}))
    assert found.mean == pytest.approx(-0.45)


def test_what_is_off_does_not_decide_a_result():
    dense, bigram = (resolve(cell, ROOT) for cell in first_cells(STUDY)[:2])
    assert not any(key.startswith("optimizer.tables") for key in identity(dense))
    assert identity(bigram)[RATE] == OptimizerConfig().tables.learning_rate_multiplier
    assert [key for key in identity(bigram) if key.startswith("model.arms")] == [
        "model.arms.names", "model.arms.bigram.rows_per_id",
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1", "gives no study: KeyError"),
    (FILE.replace("'bigram', config", "'dense', config"), "Two arms have one name"),
    (FILE.replace("baseline='dense'", "baseline='base'"), "baseline 'base' is none of dense"),
    (FILE.replace("keep=0),)", "keep=1),)"), "Every stage but the last chooses"),
    (FILE.replace("seeds=(0, 1)", "seeds=(1, 1)"), "each named once"),
    (FILE.replace("vary={}", "vary={'jtokm:model.init_std': (1,)}"), "names no arm"),
])  # fmt: skip
def test_files_that_are_no_studies_are_refused(text, message, tmp_path):
    path = tmp_path / "study.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_study(str(path))


STUDIES = sorted(path.name for path in (ROOT / "configs" / "studies").glob("*.py"))


@pytest.mark.parametrize("name", [*STUDIES, "arms.py:h100", "ablations.py:h100"])
def test_every_study_of_the_repository_can_start(name):
    study = load_study(str(ROOT / "configs" / "studies" / name))
    configs = {cell.name: resolve(cell, ROOT, data="folder") for cell in first_cells(study)}
    assert all(config.data.path == "folder" for config in configs.values())
    require_comparable(configs)
