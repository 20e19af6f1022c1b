# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What a study found: means with intervals over seeds, differences seed by seed, plots."""

import math
import pathlib
from typing import NamedTuple

import numpy as np
from scipy import stats

from jtok_jax.errors import ConfigError
from jtok_jax.study.results import Result, Table
from jtok_jax.study.run import Ranked, StageResults, finished
from jtok_jax.study.spec import Study, cells, short, study_name
from jtok_jax.study.timing import StepTime, step_times
from jtok_jax.study.trainer import Places


class Estimate(NamedTuple):
    """Mean over seeds and half the width of its interval; nan for one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:.4f}" + ("" if math.isnan(self.half) else f" +- {self.half:.4f}")

    def signed(self) -> str:
        return f"{'+' if 0 < self.mean < math.inf else ''}{self}"


def estimate(values: list[float], *, level: float = 0.95) -> Estimate:
    """Mean of independent `values` with Student's interval of probability `level`."""
    count, mean = len(values), float(np.mean(values))
    if count < 2 or not math.isfinite(mean):
        return Estimate(mean, float("nan"))
    deviation = float(np.std(values, ddof=1))
    return Estimate(mean, float(stats.t.ppf((1 + level) / 2, count - 1)) * deviation / count**0.5)


def paired(results: list[Result], baseline: list[Result]) -> Estimate | None:
    """Difference of validation losses, seed by seed; a seed is one order of the data.

    None if they have no seed in common.
    """
    losses = {result.seed: result.val_loss for result in baseline}
    common = [result for result in results if result.seed in losses]
    differences = [result.val_loss - losses[result.seed] for result in common]
    return estimate(differences) if common else None


def write_report(study: Study, places: Places, file: str) -> str:
    """Markdown of the study of `file`; RESULTS/NAME.md and its plots.

    Raises:
        ConfigError: see `finished`; or matplotlib is missing.
    """
    name, (stages, lacking) = study_name(file), finished(study, places)
    baseline = stages[-1][study.baseline][0].results
    best = {arm: ranked[0] for arm, ranked in stages[-1].items() if ranked}
    curves, trials = Table(places.results).curves(), _trials(stages)
    every = [one for ranked in stages[-1].values() for one in ranked]
    timed = step_times(places.results / f"{name}-steps.csv")
    seconds, how = _step_seconds(study, every, timed)
    draw_curves(best, curves, seconds, places.results / f"{name}-curves.svg")
    draw_cost(best, seconds, best[study.baseline], places.results / f"{name}-cost.svg")
    parts = [
        f"# {study.question}",
        f"`python -m jtok_jax.study run --study={file} --data=FOLDER`, then `report`. "
        + _circumstances(every),
        final_table(stages, baseline, trials, seconds),
        "Mean and 95% interval (Student's t) over seeds; differences are taken seed by seed. "
        "eta: parameters of tables over those of the backbone. Trials: different runs "
        "that the values of the arm were chosen from; the lowest or highest of those tried may not "
        "be the best there is. Step: seconds over the baseline's, "
        f"{how}." + _lacking(lacking),
        f"![loss against steps, FLOPs and seconds]({name}-curves.svg)",
        f"![loss against parameters and seconds]({name}-cost.svg)",
        "## What each arm trains with",
        fields_table(best),
    ]
    for number, stage in enumerate(stages[:-1], start=1):
        if any(len(ranked) > 1 for ranked in stage.values()):
            parts += [f"## Stage {number}: what was chosen from", stage_table(stage)]
    text = "\n\n".join(parts) + "\n"
    (places.results / f"{name}.md").write_text(text)
    return text


def final_table(
    stages: list[StageResults],
    baseline: list[Result],
    trials: dict[str, int],
    seconds: dict[str, float],
) -> str:
    """Markdown, a line a candidate of the last stage, by loss."""
    stage, tried = stages[-1], _tried(stages)
    lines = [
        "| arm | chosen | seeds | val loss, nats/token | against the baseline | bits/byte "
        "| backbone | tables | eta | FLOPs | step | trials |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    (base,) = {seconds[one.candidate.name] for _, one in _by_loss(stage) if one.results == baseline}
    for arm, one in _by_loss(stage):
        first = one.results[0]
        lines.append(
            f"| {arm} | {_chosen(one, tried[arm])} | {len(one.results)} "
            f"| {estimate([r.val_loss for r in one.results])} "
            f"| {_against(one.results, baseline)} "
            f"| {estimate([r.val_bpb for r in one.results])} | {_millions(first.backbone)} "
            f"| {_millions(first.tables)} | {first.tables / first.backbone:.2f} "
            f"| {first.train_flops:.2e} "
            f"| {seconds[one.candidate.name] / base:.2f} | {trials[arm]} |"
        )
    return "\n".join(lines)


def fields_table(best: dict[str, Ranked]) -> str:
    """Markdown: fields of every arm on top of its file, chosen ones included."""
    lines = ["| arm | file | fields | chosen from elsewhere |", "|---|---|---|---|"]
    for name, one in best.items():
        arm, chosen = one.candidate
        fields = sorted((dict(arm.fields) | dict(chosen)).items())
        shown = ", ".join(f"{key} {short(value)}" for key, value in fields)
        lines.append(f"| {name} | {arm.config} | {shown} | {arm.tried or ''} |")
    return "\n".join(lines)


def _lacking(names: list[str]) -> str:
    if not names:
        return ""
    more = f"; and {len(names) - 6} more" * (len(names) > 6)
    return f" Failed or not yet run: {'; '.join(names[:6])}{more}."


def _against(results: list[Result], baseline: list[Result]) -> str:
    difference = None if results == baseline else paired(results, baseline)
    common = len({result.seed for result in results} & {result.seed for result in baseline})
    fewer = f" ({common} of {max(len(results), len(baseline))} seeds)"
    fewer *= not len(results) == len(baseline) == common
    return difference.signed() + fewer if difference else ""


def stage_table(stage: StageResults) -> str:
    """Markdown: every candidate of a stage, by arm and loss."""
    lines = ["| arm | varied | val loss, nats/token |", "|---|---|---|"]
    for arm, ranked in stage.items():
        for one in ranked:
            losses = estimate([result.val_loss for result in one.results])
            lines.append(f"| {arm} | {_chosen(one, {})} | {losses} |")
    return "\n".join(lines)


def draw_curves(
    best: dict[str, Ranked], curves: dict[str, list], seconds: dict[str, float], path: pathlib.Path
) -> None:
    """Training losses, mean over seeds, of the best candidate of each arm."""
    figure, axes = _pyplot().subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    lowest = math.inf
    for arm, one in sorted(best.items(), key=lambda item: item[1].loss):
        of_seeds = [
            curves[r.cell] for r in one.results if r.status == "finished" and r.cell in curves
        ]
        if not of_seeds:
            continue
        steps = np.array([step for step, _ in of_seeds[0]])
        losses = np.mean([np.interp(steps, *zip(*c, strict=True)) for c in of_seeds], axis=0)
        first, lowest = one.results[0], min(lowest, losses.min())
        scales = 1, first.train_flops / first.steps, seconds[one.candidate.name]
        for axis, scale in zip(axes, scales, strict=True):
            axis.plot(steps * scale, losses, label=f"{arm} {one.loss:.3f}")
    for axis, label in zip(axes, ("steps", "training FLOPs", "seconds of steps"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training loss, nats/token")
    if math.isfinite(lowest):  # not all diverged
        axes[0].set_ylim(lowest - 0.05, lowest + 2)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small",
        title="validation at the end", title_fontsize="small",
    )  # fmt: skip
    _save(figure, path)


def draw_cost(
    best: dict[str, Ranked], seconds: dict[str, float], baseline: Ranked, path: pathlib.Path
) -> None:
    """Validation loss against parameters and against the time of a step."""
    pyplot = _pyplot()
    from matplotlib import ticker

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    finite = sorted(one.loss for one in best.values() if math.isfinite(one.loss))
    crowded = (finite[-1] - finite[0]) / 20 if finite else 0
    for arm, one in best.items():
        losses = estimate([result.val_loss for result in one.results])
        if not math.isfinite(losses.mean):
            continue
        first = one.results[0]
        step = seconds[one.candidate.name] / seconds[baseline.candidate.name]
        places = (first.backbone + first.tables) / 1e6, step
        half = 0 if math.isnan(losses.half) else losses.half
        above = any(0 < loss - losses.mean < crowded for loss in finite)  # its label goes there
        for axis, place in zip(axes, places, strict=True):
            axis.errorbar(place, losses.mean, yerr=half, fmt="o", capsize=3)
            axis.annotate(
                arm, (place, losses.mean), xytext=(5, -11 if above else 4),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes[0].set(xscale="log", xlabel="parameters, tables included, millions")
    axes[0].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[0].xaxis.set_minor_locator(ticker.NullLocator())
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("validation loss, nats/token (95%)")
    axes[1].set_xlabel("seconds a step over the baseline's")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.margins(x=0.35)
    _save(figure, path)


def _step_seconds(
    study: Study, every: list[Ranked], times: dict[str, StepTime]
) -> tuple[dict[str, float], str]:
    """Seconds of a step of every candidate, and how they were measured.

    Paired times count where they are of these runs, as their fields tell, and of their device.
    """
    devices = {result.device for one in every for result in one.results}
    candidates = {one.candidate.name: [one.candidate] for one in every}
    first = {cell.candidate.name: cell.key for cell in cells(study, study.stages[-1], candidates)
             if cell.seed == study.stages[-1].seeds[0]}  # fmt: skip
    if all(name in times and times[name].cell == key for name, key in first.items()) and (
        devices == {times[name].device for name in first}
    ):
        baseline = {one.candidate.name for one in every if one.candidate.arm.name == study.baseline}
        base = next(one for one in times.values() if one.candidate in baseline)
        seconds = {name: times[name].ratio * base.milliseconds / 1000 for name in first}
        return seconds, f"paired over {base.rounds} rounds ({base.device}, {base.commit})"
    median = lambda one: float(np.median([result.step_seconds for result in one.results]))
    how = "as the runs found the machine" + ", of several kinds" * (len(devices) > 1)
    how += "; there are paired times, of other runs or another device" * bool(times)
    return {one.candidate.name: median(one) for one in every}, how


def _by_loss(stage: StageResults) -> list[tuple[str, Ranked]]:
    flat = [(arm, one) for arm, ranked in stage.items() for one in ranked]
    return sorted(flat, key=lambda item: item[1].loss)


def _trials(stages: list[StageResults]) -> dict[str, int]:
    """Different runs that the values of every arm were chosen from, here or before; 1: of none."""
    tried: dict[str, set] = {arm: set() for arm in stages[-1]}
    for stage in stages[:-1]:
        for arm, ranked in stage.items():
            tried[arm] |= {result.cell for one in ranked for result in one.results}
    before = {arm: max((one.candidate.arm.tried for one in ranked), default=0)
              for arm, ranked in stages[-1].items()}  # fmt: skip
    return {arm: max(len(here) + before[arm], 1) for arm, here in tried.items()}


def _tried(stages: list[StageResults]) -> dict[str, dict[str, set]]:
    """Numbers that the stages of a study tried for the fields of every arm."""
    tried: dict[str, dict[str, set]] = {arm: {} for arm in stages[-1]}
    for arm, ranked in ((arm, some) for stage in stages for arm, some in stage.items()):
        for key, value in (pair for one in ranked for pair in one.candidate.chosen):
            if isinstance(value, int | float):
                tried[arm].setdefault(key, set()).add(value)
    return tried


def _circumstances(ranked: list[Ranked]) -> str:
    results = [result for one in ranked for result in one.results]
    named = lambda values: ", ".join(sorted({str(value) for value in values}))
    return (
        f"{len(results)} runs of {results[0].tokens / 1e6:.2f}M tokens on "
        f"{named(r.device for r in results)}; "
        f"seeds {named(r.seed for r in results)}; data {named(r.data for r in results)}; "
        f"commits {named(r.commit for r in results)}."
    )


def _chosen(one: Ranked, tried: dict[str, set]) -> str:
    """Values of what was varied, and whether one is at the end of those `tried`."""

    def text(key: str, value: object) -> str:
        shown = short(value)
        of = sorted(tried.get(key, ()))
        if len(of) < 2 or value not in (of[0], of[-1]):
            return shown
        return f"{shown} ({'lowest' if value == of[0] else 'highest'} of {len(of)})"

    values = one.candidate.chosen
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {text(key, value)}" for key, value in values)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


def _save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("Plots need matplotlib: pip install -e '.[plot]'.") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "jtok_jax"  # the same figures give the same file
    from matplotlib import pyplot

    return pyplot
