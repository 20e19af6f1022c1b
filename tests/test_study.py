# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A study as a user runs it, and what it refuses; arithmetic of its report."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from pythons import oldest
from small_study import (
    ARMS,
    FILE,
    RATE,
    STUDY,
    candidates_of,
    fill,
    filled,
    finished_at,
    first_cells,
)
from tqdm import tqdm

from jtok_jax.arms_config import ArmsConfig
from jtok_jax.config import OptimizerConfig
from jtok_jax.errors import ConfigError, DataError, Preempted, WorkdirError
from jtok_jax.model_config import JtokConfig
from jtok_jax.study import Arm, Stage, trainer
from jtok_jax.study.__main__ import main
from jtok_jax.study.report import write_report
from jtok_jax.study.results import Table
from jtok_jax.study.run import load_progress, run_study
from jtok_jax.study.spec import cells, check_study, expand, identity, load_study, resolve
from jtok_jax.study.trainer import Paths, StudyError
from jtok_jax.training.guards import StopSignal

pytestmark = oldest


def test_a_killed_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Killed in its second run; nothing finished is trained again."""
    file, runs = tmp_path / "killed.py", tmp_path / "runs"
    study = dataclasses.replace(STUDY, arms=ARMS[:1], stages=(Stage(200, seeds=(0, 1)),))
    file.write_text(FILE.replace(repr(STUDY), repr(study)))
    command = ["run", f"--study={file}", f"--runs={runs}", f"--results={tmp_path}"]
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # seeds share programs
    second = runs / first_cells(study)[1].key / "metrics.jsonl"
    with (tmp_path / "console.txt").open("w") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", "jtok_jax.study", *command],
            cwd=ROOT, stderr=console, stdout=console, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        saved = lambda: [one for one in second.parent.glob("checkpoints/*") if one.name.isdigit()]
        while not saved():
            assert time.monotonic() < deadline, (tmp_path / "console.txt").read_text()
            assert process.poll() is None, (tmp_path / "console.txt").read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = (tmp_path / "cells.csv").read_text()
    assert before.count("\n") == 2
    monkeypatch.chdir(ROOT)
    main(command)
    after = (tmp_path / "cells.csv").read_text()
    assert after.startswith(before)
    assert after.count("\n") == 3
    assert ",1 x cpu," in after
    assert "resumed at step" in second.with_name("console.txt").read_text()
    assert "100%" in capsys.readouterr().err
    main(["report", f"--study={file}", f"--results={tmp_path}"])
    text = (tmp_path / "killed.md").read_text()
    assert "| dense |  | 2 |" in text
    assert "Failed or not yet run" not in text
    for name in ("killed-curves.svg", "killed-cost.svg"):
        assert (tmp_path / name).stat().st_size > 500


@pytest.fixture
def ends(monkeypatch):
    """Runs that train nothing: each ends at once with the exit code of its arm, or 0."""
    codes = {}

    def command(cell, config, paths):
        config, workdir = resolve(cell, ROOT), trainer.workdir_of(cell, paths)
        record = {"step": config.train.steps, "loss": 1.0, "step_seconds": 1.0}
        lines = json.dumps(record | {"val_loss": 1.0, "val_bpb": 1.0})
        script = (
            f"import os, pathlib; workdir = pathlib.Path({str(workdir)!r});"
            f"(workdir / 'metrics.jsonl').write_text({lines!r});"
            f"(workdir / 'checkpoints').mkdir(exist_ok=True);"
            f"print('last words in', os.environ[{trainer.CACHE!r}]);"
            f"raise SystemExit({codes.get(cell.candidate.arm.name, 0)})"
        )
        return [sys.executable, "-c", script]

    monkeypatch.setattr(trainer, "command", command)
    monkeypatch.delenv(trainer.CACHE, raising=False)
    return codes


def test_a_failed_run_is_reported_and_the_rest_go_on(tmp_path, capsys, ends):
    """The arm with the failed run ends with the stage that chooses, the other trains its last."""
    ends["bad"] = 2
    stages = Stage(5, vary={"model.init_std": (0.1, 0.2)}, keep=1), Stage(6)
    arms = Arm("bad", "configs/arms/bigram.py"), ARMS[0]
    study = dataclasses.replace(STUDY, arms=arms, stages=stages)
    places = Paths(ROOT, tmp_path / "runs", tmp_path / "results")
    with pytest.raises(StudyError, match=r"2 of the runs failed, see above\. bad could not go on"):
        run_study(study, places, keep_checkpoints=False)
    told = capsys.readouterr()
    assert "FAILED bad init_std=0.1, 5 steps, seed 0: exit code 2" in told.err
    # What the runs to come need not compile again is kept beside them.
    assert f"last words in {places.runs / 'compiled'}" in told.err
    lines = (places.results / "cells.csv").read_text().splitlines()[1:]
    assert [",dense," in line and ",finished," in line for line in lines] == [True] * 3
    assert ",6,0,finished" in lines[2]
    assert [path.parent.name for path in places.runs.glob("*/checkpoints")] == [
        cell.key for cell in first_cells(study) if cell.candidate.arm.name == "bad"
    ]
    text = write_report(study, places, "x")
    assert "| dense | init_std" in text
    assert "Failed or not yet run: bad init_std=0.1, 5 steps, seed 0; bad init_std=0.2" in text


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
    first = candidates_of(TWO_STAGES, one)
    places = fill(tmp_path, cells(TWO_STAGES, one, first), by_init)
    progress = load_progress(TWO_STAGES, places)
    assert [*progress.candidates] == ["dense"]  # bigram lacks all of its second
    second = [
        f"bigram init_std={i} learning_rate_multiplier={r}" for i in (0.3, 0.2) for r in (3, 9)
    ]
    missing = [name for name in progress.missing if name.startswith("bigram")]
    assert missing == [f"{name}, 10 steps, seed 0" for name in (second[1], second[3])]
    best = expand([first[8], first[5]], two)  # 0.3 and 0.2 at a rate of 3; 0.3 at 1 diverged
    fill(tmp_path, cells(TWO_STAGES, two, best), by_init)
    last = load_progress(TWO_STAGES, places).candidates
    assert {name: [one.name for one in some] for name, some in last.items()} == {
        "dense": ["dense init_std=0.2"],
        "bigram": ["bigram init_std=0.3 learning_rate_multiplier=3"],
    }


def test_a_candidate_that_comes_up_twice_counts_once():
    one, two, _ = TWO_STAGES.stages
    some = candidates_of(TWO_STAGES, one)[3:5]  # bigram, 0.1 at 1.0 and at 3.0
    assert [c.name.rsplit("=", 1)[1] for c in expand(some, two)] == ["3", "9"]


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


def test_a_run_that_another_study_has_trained_meanwhile_is_not_trained(tmp_path, monkeypatch):
    places, trained = Paths(ROOT, tmp_path / "runs", tmp_path), []

    def train(cell, config, paths, bar, stop, *, data):
        trained.append(cell)
        result, _, curve = finished_at(cell, data=data)
        if len(trained) == 1:
            for other in first_cells(STUDY)[1:]:
                Table(tmp_path).add(*finished_at(other, data=data))
        return result, curve

    monkeypatch.setattr("jtok_jax.study.run.train_cell", train)
    run_study(STUDY, places, keep_checkpoints=False)
    assert trained == first_cells(STUDY)[:1]


def test_a_run_names_every_version_that_trained_it(tmp_path):
    path = tmp_path / "commits.txt"
    found = [trainer._add_version(path, now) for now in ("a1", "a1", "b2")]  # killed twice
    assert found == ["a1", "a1", "a1 b2"]


def test_the_exit_code_of_a_run_decides_what_becomes_of_it(tmp_path, ends):
    """Its parameters may overflow where validation does not read them."""
    cell, places = first_cells(STUDY)[0], Paths(ROOT, tmp_path / "runs", tmp_path)

    def train(code):
        ends["dense"] = code
        with StopSignal() as stop, tqdm(disable=True) as bar:
            return trainer.train_cell(cell, resolve(cell, ROOT), places, bar, stop, data="x")[0]

    for code, status, loss in ((0, "finished", 1.0), (6, "diverged", float("inf"))):
        result = train(code)
        assert (result.status, result.val_loss) == (status, loss)
    for code, error, message in (
        (3, WorkdirError, "last words .*Another study"), (42, Preempted, "Stopped in dense"),
        (1, StudyError, "exit code 1.*\n.*last words"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            train(code)


def test_requests_to_stop_are_passed_on_and_kept():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        process = subprocess.Popen(["sleep", "60"])
        asks = lambda: stop.name or os.kill(os.getpid(), signal.SIGINT)
        assert trainer.wait(process, stop, asks) == -signal.SIGTERM
        late = subprocess.Popen(["sleep", "60"])
        assert trainer.wait(late, stop, lambda: None) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


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
        run_study(study, Paths(ROOT, tmp_path, tmp_path), keep_checkpoints=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arm", "vary", "message"), [
    ({"train.batch_size": 8}, {}, "train.batch_size: 8 in dense, .* 4 in bigram"),
    ({"model.vocabsize": 3}, {}, "there is no field 'model.vocabsize'"),
    ({}, {"bigram:model.nrom": (1, 2)}, "there is no field 'model.nrom'"),
    ({}, {f"bigram:{RATE}": (1.0, 1.00001)}, "Two candidates are called 'bigram .*=1, 10 steps"),
    ({}, {"bigram:model.num_kv_heads": (2, 3)}, "num_kv_heads"),
])  # fmt: skip
def test_arms_of_a_later_stage_are_looked_at_before_the_first(arm, vary, message, tmp_path):
    """dense has nothing to choose from in the first stage."""
    arms = dataclasses.replace(ARMS[0], fields=arm), ARMS[1]
    stages = Stage(10, vary={f"bigram:{RATE}": (1.0, 3.0)} | vary, keep=1), Stage(20)
    study = dataclasses.replace(STUDY, arms=arms, stages=stages)
    with pytest.raises(ConfigError, match=message):
        run_study(study, Paths(ROOT, tmp_path, tmp_path), keep_checkpoints=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        load_progress(study, Paths(ROOT, tmp_path, tmp_path))


@pytest.mark.parametrize(("tables", "chosen"), [((8, 16), None), ((2, 8), "K cannot exceed n_e")])
def test_a_stage_may_need_what_the_one_before_chooses(tables, chosen):
    """Eight of five tables cannot be chosen, and five is what the arm's file has."""
    arms = ARMS[0], Arm("jtok_m", "configs/arms/jtok_m.py")
    stages = (
        Stage(10, vary={"jtok_m:model.jtok.num_tables": tables}, keep=1),
        Stage(10, vary={"jtok_m:model.jtok.top_k": (2, 8)}, keep=1),
        Stage(20),
    )
    study = dataclasses.replace(STUDY, arms=arms, stages=stages)
    if not chosen:
        return check_study(study, ROOT)
    with pytest.raises(ConfigError, match=chosen):
        check_study(study, ROOT)


def test_steps_and_seeds_are_of_stages_alone():
    stage = Stage(10, vary={"dense:train.seed": (7, 8)})
    arm = dataclasses.replace(ARMS[0], fields={"train.seed": 1})
    for changes in ({"common": {"train.steps": 5}}, {"stages": (stage,)}, {"arms": (arm,)}):
        with pytest.raises(ConfigError, match=r"train\.(steps|seed): every Stage has its own"):
            dataclasses.replace(STUDY, **changes)


def test_a_changed_configuration_under_a_finished_run_is_refused(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    configs = tmp_path / "configs.json"
    configs.write_text(configs.read_text().replace('"optimizer.b1": 0.9', '"optimizer.b1": 0.8'))
    with pytest.raises(ConfigError, match=r"dense, .*\n  optimizer.b1: 0.8 in the table, 0.9 now"):
        load_progress(STUDY, places)


def test_folders_that_cannot_be_written_are_told_before_anything_is_trained(tmp_path):
    (tmp_path / "file").touch()
    for results, runs, message in (
        (tmp_path / "file", tmp_path, "--results=.*file cannot be written"),
        (tmp_path, tmp_path / "file", "--runs=.*file cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_study(STUDY, Paths(ROOT, runs, results), keep_checkpoints=False)
    assert not list(tmp_path.rglob("console.txt"))


def test_the_bar_leaves_out_the_record_before_the_first_step(tmp_path):
    metrics, bar = tmp_path / "metrics.jsonl", tqdm(total=9, file=io.StringIO(), initial=5)
    for lines, steps in ((0, 0), (1, 0), (2, 1), (3, 2)):
        metrics.write_text("{}\n" * lines)
        trainer._show(bar, 5, metrics)
        assert bar.n == 5 + steps


def test_other_data_under_a_finished_run_are_refused(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    other = dataclasses.replace(STUDY, stages=(Stage(steps=5),))  # none of its runs is there
    for study in (STUDY, other):
        with pytest.raises(DataError, match="Losses on different texts cannot be compared"):
            run_study(study, places, keep_checkpoints=False)


def test_what_is_off_does_not_decide_a_result():
    dense, bigram = (resolve(cell, ROOT) for cell in first_cells(STUDY)[:2])
    assert not any(key.startswith("optimizer.tables") for key in identity(dense))
    assert identity(bigram)[RATE] == OptimizerConfig().tables.learning_rate_multiplier
    assert [key for key in identity(bigram) if key.startswith("model.arms")] == [
        "model.arms.names", "model.arms.table_dtype", "model.arms.ngram.streams",
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1", "gives no study: KeyError.'get_study'"),
    ("def get_study(): return {}[1]", "gives no study: KeyError.1"),
    (FILE.replace("'bigram', config", "'dense', config"), "Two arms have one name"),
    (FILE.replace("baseline='dense'", "baseline='base'"), "baseline 'base' is none of dense"),
    (FILE.replace("keep=0),)", "keep=1),)"), "Every stage but the last chooses"),
    (FILE.replace("seeds=(0, 1)", "seeds=(1, 1)"), "each named once"),
    (FILE.replace("vary={}", "vary={'jtokm:model.init_std': (1,)}"), "names no arm"),
    (FILE.replace("vary={}", "vary={'model.init_std': 0.1}"), "over 0.1; expected a tuple"),
    (FILE.replace("vary={}", "vary={'model.init_std': ()}"), "expected a tuple"),
    (FILE.replace("vary={}", "vary={'model.init_std': ([1],)}"), "tuple of plain values"),
    (FILE.replace("keep=0),)", "keep=-1),)"), "keeps -1 candidates"),
    ("get_study = lambda: None", "get_study.. returned None"),
])  # fmt: skip
def test_files_that_are_no_studies_are_refused(text, message, tmp_path):
    path = tmp_path / "study.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_study(str(path))


STUDIES = sorted(path.name for path in (ROOT / "configs" / "studies").glob("*.py"))


@pytest.mark.parametrize("name", [*STUDIES, "arms.py:h100", "embedding.py:full"])
def test_every_study_of_the_repository_can_start(name):
    check_study(load_study(str(ROOT / "configs" / "studies" / name)), ROOT, data="folder")
