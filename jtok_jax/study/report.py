# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What a study found: means with intervals over seeds, differences seed by seed, plots."""

import numpy as np

from jtok_jax.study.estimate import Estimate, diverged, estimate
from jtok_jax.study.plots import draw_cost, draw_curves
from jtok_jax.study.results import Result, Table
from jtok_jax.study.run import Ranked, StageResults, finished
from jtok_jax.study.spec import Study, cells, short, study_name
from jtok_jax.study.timing import StepTime, step_times
from jtok_jax.study.trainer import Places


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
    base = stages[-1][study.baseline][0]
    best = {arm: ranked[0] for arm, ranked in stages[-1].items() if ranked}
    curves, trials = Table(places.results).curves(), _trials(stages)
    every = [one for ranked in stages[-1].values() for one in ranked]
    timed = step_times(places.results / f"{name}-steps.csv")
    seconds, how, timed = _step_seconds(study, every, timed)
    draw_curves(best, curves, seconds, places.results / f"{name}-curves.svg")
    draw_cost(best, seconds, best[study.baseline], places.results / f"{name}-cost.svg")
    parts = [
        f"# {study.question}",
        f"`python -m jtok_jax.study run --study={file} --data=FOLDER`, then `report`. "
        + _circumstances(every),
        final_table(stages, base, trials, seconds, timed),
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
    base: Ranked,
    trials: dict[str, int],
    seconds: dict[str, float],
    timed: dict[str, StepTime],
) -> str:
    """Markdown, a line a candidate of the last stage, by loss; `base` is the baseline's best."""
    stage, tried = stages[-1], _tried(stages)
    lines = [
        "| arm | chosen | seeds | val loss, nats/token | against the baseline | bits/byte "
        "| backbone | tables | eta | FLOPs | step | trials |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, one in _by_loss(stage):
        first = one.results[0]
        ratio = seconds[one.candidate.name] / seconds[base.candidate.name]
        lines.append(
            f"| {arm} | {_chosen(one, tried[arm])} | {len(one.results)} "
            f"| {_loss(one.results)} "
            f"| {_against(one.results, base.results)} "
            f"| {estimate([r.val_bpb for r in one.results])} | {_millions(first.backbone)} "
            f"| {_millions(first.tables)} | {first.tables / first.backbone:.2f} "
            f"| {first.train_flops:.2e} "
            f"| {ratio:.2f}{_range(one, timed)} | {trials[arm]} |"
        )
    return "\n".join(lines)


def _range(one: Ranked, timed: dict[str, StepTime]) -> str:
    time = timed.get(one.candidate.name)
    return f" ({time.low:.2f} to {time.high:.2f})" if time and time.low < time.high else ""


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


def _loss(results: list[Result]) -> str:
    losses = [result.val_loss for result in results]
    if 0 < (lost := diverged(losses)) < len(losses):
        return f"{lost} of {len(losses)} diverged"
    return str(estimate(losses))


def _against(results: list[Result], baseline: list[Result]) -> str:
    if results != baseline and diverged([result.val_loss for result in baseline]):
        return "the baseline diverged"
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
            lines.append(f"| {arm} | {_chosen(one, {})} | {_loss(one.results)} |")
    return "\n".join(lines)


def _step_seconds(
    study: Study, every: list[Ranked], times: dict[str, StepTime]
) -> tuple[dict[str, float], str, dict[str, StepTime]]:
    """Seconds of a step of every candidate, how they were measured, and the times that count.

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
        how = f"median (10th to 90th percentile), paired over {base.rounds} rounds"
        return seconds, f"{how} ({base.device}, {base.commit})", times
    median = lambda one: float(np.median([result.step_seconds for result in one.results]))
    how = "as the runs found the machine" + ", of several kinds" * (len(devices) > 1)
    how += "; there are paired times, of other runs or another device" * bool(times)
    return {one.candidate.name: median(one) for one in every}, how, {}


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
