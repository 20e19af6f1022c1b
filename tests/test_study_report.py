# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What a report and a fit say of results whose mean, difference or gain is known."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import ROOT
from pythons import oldest
from scipy import stats
from small_study import ARMS, COMMON, RATE, STUDY, fill, filled, first_cells

from jtok_jax import flops
from jtok_jax.errors import ConfigError
from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.estimate import estimate
from jtok_jax.study.fit import log_size_at, write_fit
from jtok_jax.study.report import paired, write_report
from jtok_jax.study.results import Result
from jtok_jax.study.run import load_progress
from jtok_jax.study.spec import Candidate, cells, expand, resolve
from jtok_jax.study.timing import time_candidates
from jtok_jax.study.trainer import Paths

pytestmark = oldest


def test_a_run_that_two_stages_choose_from_is_one_trial(tmp_path):
    arms = ARMS[0], dataclasses.replace(ARMS[1], fields=ARMS[1].fields | {RATE: 3.0})
    stages = (
        Stage(10, vary={"bigram:model.init_std": (0.1, 0.2)}, keep=1),
        Stage(10, vary={f"bigram:{RATE}": (3.0, 9.0)}, keep=1),
        Stage(20),
    )
    study = dataclasses.replace(STUDY, arms=arms, stages=stages)
    best = {arm.name: [Candidate(arm)] for arm in arms}
    larger = lambda cell: 15 - sum(cell.fields.get(key, 0.0) for key in ("model.init_std", RATE))
    for stage in stages:  # the last candidate is the best
        for arm, some in best.items():
            candidates = expand(some, stage)
            places = fill(tmp_path, cells(study, stage, candidates), larger)
            best[arm] = candidates[-1:] or some
    lines = write_report(study, places, "x").splitlines()
    line = next(line for line in lines if line.startswith("| bigram"))
    assert line.endswith("| 3 |")


def test_a_run_that_diverged_comes_last_and_is_told(tmp_path):
    study = dataclasses.replace(STUDY, stages=(Stage(10, vary={f"bigram:{RATE}": (1.0, 3.0)}),))
    wanted = first_cells(study)
    places = fill(tmp_path, wanted, lambda c: None if c.fields.get(RATE) == 1.0 else 3.0)
    progress = load_progress(study, places)
    assert [one.loss for one in progress.stages[0]["bigram"]] == [3.0, np.inf]
    assert not progress.missing
    text = write_report(study, places, "x")
    line = next(line for line in text.splitlines() if "multiplier 1 (lowest of 2)" in line)
    assert line.startswith("| bigram | learning_rate_multiplier 1 (lowest of 2) | 1 | diverged |")
    assert line.count("diverged") == 3
    places = fill(tmp_path / "all", wanted, lambda _: None)
    assert write_report(study, places, "x").count("diverged") >= 6


def test_seeds_that_diverged_are_counted(tmp_path):
    losses = {("dense", 0): 3.0, ("dense", 1): 3.1, ("bigram", 0): 2.5, ("bigram", 1): None}
    places = fill(tmp_path, first_cells(STUDY), lambda c: losses[c.candidate.arm.name, c.seed])
    assert "| bigram |  | 2 | 1 of 2 diverged | diverged |" in write_report(STUDY, places, "x.py")
    assert "bigram 1 of 2 diverged" in (tmp_path / "x-curves.svg").read_text()


def test_a_baseline_that_diverged_is_told(tmp_path):
    fill(tmp_path, first_cells(STUDY)[::2], lambda _: None)
    places = fill(tmp_path, first_cells(STUDY)[1::2], lambda _: 2.5)
    assert "| 2.5000 +- 0.0000 | the baseline diverged |" in write_report(STUDY, places, "x.py")


@pytest.fixture
def known_data(monkeypatch):
    """What is to be timed has the data of the table."""
    monkeypatch.setattr("jtok_jax.study.timing.data_fingerprint", lambda config: "x")


@pytest.mark.usefixtures("known_data")
def test_step_times_are_paired_and_used_by_the_report(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    assert "as the runs found the machine" in write_report(STUDY, places, "x.py")
    found = time_candidates(STUDY, places, "x", rounds=3)
    assert "| dense | 1.000 | 1.000 to 1.000 |" in found
    lines = (tmp_path / "x-steps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["candidate", "dense", "bigram"]
    assert "paired over 3 rounds (1 x cpu, " in write_report(STUDY, places, "x.py")
    table = tmp_path / "cells.csv"
    lines, whole = table.read_text().splitlines(keepends=True), table.read_text()
    table.write_text("".join(line for line in lines if ",bigram,{},600,0," not in line))
    assert "paired over 3 rounds" in write_report(STUDY, places, "x.py")  # not every seed is there
    table.write_text(whole)
    arms = ARMS[0], dataclasses.replace(ARMS[1], fields={"model.streams": "bigram=2:2V"})
    wider = dataclasses.replace(STUDY, arms=arms)  # not what was timed
    fill(tmp_path, first_cells(wider), lambda _: 2.0)
    unused = (
        "as the runs found the machine; there are paired times, of other runs or another device"
    )
    assert unused in write_report(wider, places, "x.py")
    table.write_text(table.read_text().replace(",1 x cpu,", ",1 x gpu,"))
    assert unused in write_report(STUDY, places, "x.py")
    table.write_text(table.read_text().replace(",1 x gpu,", ",1 x cpu,", 1))
    assert "as the runs found the machine, of several kinds;" in write_report(STUDY, places, "x.py")
    times = tmp_path / "x-steps.csv"
    times.write_text(times.read_text().replace("candidate,cell,", "candidate,"))
    with pytest.raises(ConfigError, match="run `study time` again"):
        write_report(STUDY, places, "x.py")


def test_values_at_the_end_of_what_was_tried_are_told(tmp_path):
    """0.3 is the highest of three; 1 is the lower of two rates, and the other stage adds none."""
    stages = (
        Stage(10, vary={"model.init_std": (0.1, 0.2, 0.3), f"bigram:{RATE}": (1.0, 3.0)}, keep=1),
        Stage(20),
    )
    study = dataclasses.replace(STUDY, stages=stages)
    of = lambda cell, key: cell.fields.get(key, 0.0)
    larger = lambda cell: 9 - of(cell, "model.init_std") + of(cell, RATE)
    fill(tmp_path, first_cells(study), larger)
    best = [
        min(
            expand([Candidate(arm)], stages[0]),
            key=lambda one: larger(cells(study, stages[0], [one])[0]),
        )
        for arm in ARMS
    ]
    places = fill(tmp_path, cells(study, stages[1], best), larger)
    text = write_report(study, places, "x")
    assert "| bigram | init_std 0.3 (highest of 3), learning_rate_multiplier 1 (lowest of 2) |" in (
        text
    )
    assert "| dense | init_std 0.3 (highest of 3) | 1 |" in text


def test_seeds_with_curves_of_unlike_length_are_drawn(tmp_path):
    """A step that was not finite is left out of a curve."""
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    lines = (tmp_path / "curves.csv").read_text().splitlines(keepends=True)
    (tmp_path / "curves.csv").write_text("".join(lines[:5] + lines[6:]))
    assert "| dense |  | 2 |" in write_report(STUDY, places, "x")


def test_arms_without_a_common_seed_have_no_difference(tmp_path):
    wanted = [c for c in first_cells(STUDY) if (c.candidate.arm.name == "dense") == (c.seed == 0)]
    text = write_report(STUDY, fill(tmp_path, wanted, lambda _: 2.0), "x")
    assert "| bigram |  | 1 | 2.0000 |  |" in text


def test_a_report_tells_which_runs_there_are_none_of(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    longer = dataclasses.replace(STUDY, stages=(Stage(steps=600, seeds=(0, 1, 2)),))
    assert "Failed or not yet run: dense, 600 steps, seed 2; bigram" in (
        write_report(longer, places, "x")
    )
    none = dataclasses.replace(STUDY, stages=(Stage(steps=7),))
    with pytest.raises(ConfigError, match=r"lacks 2 of the study.s runs: dense, 7 steps, seed 0"):
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
    law = "gamma = 0.300 eta^-0.500 rho^0.250, r2 1.000, over 4 candidates, 1 of them beyond the"
    assert law in text
    assert "factor 0.300 to 0.300, exponent of eta -0.500 to -0.500, of rho 0.250 to 0.250" in text
    assert "| jtok_m 4/1 |" in text
    assert "*" in text.split("jtok_m 8/8")[1].split("\n")[0]  # beyond the largest dense
    assert "*" not in text.split("| jtok_m 2/1")[1].split("\n")[0]
    few = dataclasses.replace(study, arms=SIZES[:2] + MIXED)
    with pytest.raises(ConfigError, match="needs at least 3 different sizes"):
        write_fit(few, places, "x.py")


def test_a_gain_has_an_interval_over_seeds(tmp_path):
    """A seed by which all sizes are better or worse leaves the gain as it is."""
    gains = {1: 1.02, 2: 1.04, 3: 1.06}
    arms = (*SIZES, MIXED[0])
    study = Study("?", COMMON, arms, (Stage(steps=5, seeds=tuple(gains)),), baseline="dense64")

    def loss(cell):
        size = flops.count(resolve(cell, ROOT).model, seq_len=16).backbone
        of_arm = gains[cell.seed] if cell.candidate.arm == MIXED[0] else 1.0
        return (4 + 0.2 * cell.seed) * (size * of_arm) ** -0.07

    row = lambda folder, study, loss: next(
        line.split("|")[5].strip()
        for line in write_fit(study, fill(folder, first_cells(study), loss), "x").splitlines()
        if line.startswith("| jtok_m")
    )
    logs = np.log(list(gains.values()))
    half = stats.t.ppf(0.975, 2) * np.std(logs, ddof=1) / 3**0.5
    gain, low, high = map(float, re.findall(r"[\d.]+", row(tmp_path / "all", study, loss)))
    assert gain == pytest.approx(np.exp(logs.mean()), abs=2e-3)
    assert [low, high] == pytest.approx(gain * np.exp([-half, half]), abs=1e-3)
    noisy = lambda cell: loss(cell) + 0.03 * (cell.seed == 2 and cell.candidate.arm == SIZES[2])
    assert "to" not in row(tmp_path / "noisy", study, noisy)
    one_seed = dataclasses.replace(study, stages=(Stage(steps=5, seeds=(2,)),))
    assert row(tmp_path / "one", one_seed, loss) == "1.040"


def test_a_fit_reads_bent_curves_and_tells_what_has_no_size(tmp_path):
    """At fixed D, Eq. 5 bends over N; an arm that gains nothing or diverged is not left out."""
    wide = {"dense80": 256, "dense96": 1024}
    sizes = [dataclasses.replace(arm, fields={"model.ffn_dim": wide.get(arm.name, 64)})
             for arm in SIZES]  # fmt: skip
    study = Study("?", COMMON, (*sizes, *MIXED), (Stage(steps=5),), baseline="dense64")
    count = lambda cell: flops.count(resolve(cell, ROOT).model, seq_len=16).backbone
    counts = {cell.candidate.arm.name: count(cell) for cell in first_cells(study)}
    law = lambda size: (2e3 / size + 2e5 / 1e6) ** 0.5  # alpha = beta = 0.5, D = 1e6
    as_large_as = counts | {
        "jtok_m 2/1": counts["dense80"], "jtok_m 4/1": 0.9 * counts["jtok_m 4/1"],
        "jtok_m 4/2": counts["dense96"], "jtok_m 8/8": None,
    }  # fmt: skip

    def loss(cell):
        size = as_large_as[cell.candidate.arm.name]
        return None if size is None else law(size)

    text = write_fit(study, fill(tmp_path, first_cells(study), loss), "x")
    rows = {row.split("|")[1].strip(): row.split("|")[5] for row in text.splitlines() if "|" in row}
    for name in ("jtok_m 2/1", "jtok_m 4/1", "jtok_m 4/2"):
        expected = as_large_as[name] / counts[name]
        assert float(rows[name].strip(" *")) == pytest.approx(expected, rel=0.03), name
    assert "*" in rows["jtok_m 4/1"]
    assert "| jtok_m 8/8 | diverged |" in text
    assert "No law of gamma over eta and rho: gain has 0." in text
    falls = lambda cell: 3.0 if cell.candidate.arm.name == "dense80" else 2.0
    with pytest.raises(ConfigError, match="with losses that fall"):
        write_fit(study, fill(tmp_path / "flat", first_cells(study), falls), "x")
    steep = lambda cell: None if cell.candidate.arm.name == "dense64" else loss(cell)
    with pytest.raises(ConfigError, match=r"\[\(\d+, inf\).*with losses that fall"):
        write_fit(study, fill(tmp_path / "steep", first_cells(study), steep), "x")
    slope = lambda cell: 2.0 - 1e-9 * counts[cell.candidate.arm.name]  # nearly flat
    far = lambda cell: slope(cell) if cell.candidate.arm.name.startswith("dense") else 1.0
    assert "| inf *" in write_fit(study, fill(tmp_path / "far", first_cells(study), far), "x")
    low = lambda cell: slope(cell) if cell.candidate.arm.name.startswith("dense") else 3.0
    assert "| 0.000 *" in write_fit(study, fill(tmp_path / "low", first_cells(study), low), "x")
    twice = dataclasses.replace(study, arms=(*study.arms, dataclasses.replace(sizes[0], name="b")))
    with pytest.raises(ConfigError, match=r"Arms of .*dense\.py .* different sizes"):
        write_fit(twice, Paths(ROOT, tmp_path, tmp_path), "x")


@pytest.mark.parametrize("alpha_beta", [(0.12, 0.122), (0.34, 0.28)])
@pytest.mark.parametrize("bound_by_data", [0.1, 1.0])  # error of parameters over that of data
def test_small_gains_are_read_off_bent_curves(alpha_beta, bound_by_data):
    """Eq. 5 at fixed D, at the sizes of configs/studies/sizes.py; chords err by up to a third."""
    alpha, beta = alpha_beta
    loss = lambda n: 2 * (bound_by_data * (1.73e7 / n) ** (alpha / beta) + 1) ** beta
    counts = np.array([6.7e6, 10.6e6, 20.5e6, 34.1e6, 60.1e6])
    for base in counts[1:3]:
        for gain in (1.1, 1.5, 2.0):
            found = np.exp(log_size_at(loss(gain * base), counts, loss(counts))) / base
            assert found - 1 == pytest.approx(gain - 1, rel=0.05)


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
    assert found.half == pytest.approx(12.706 * 0.05, abs=1e-3)  # -0.4 and -0.5
    assert paired(of({0: 1.0}), of({1: 1.0})) is None
