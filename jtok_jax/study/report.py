# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Reports what a study found: means with intervals over seeds, differences seed by seed, plots."""

import itertools

import numpy as np

from jtok_jax import flops
from jtok_jax.study.estimate import Estimate, estimate, markdown_table
from jtok_jax.study.plots import draw_cost, draw_curves
from jtok_jax.study.results import Result, Table
from jtok_jax.study.run import Ranked, StageResults, load_progress
from jtok_jax.study.spec import Study, cells, resolve, short, study_name
from jtok_jax.study.timing import StepTime, step_times
from jtok_jax.study.trainer import Paths

FINAL = ("arm", "chosen", "seeds", "val loss, nats/token", "against the baseline", "bits/byte",
         "backbone", "tables", "eta", "training FLOPs", "FLOPs to decode a token", "step",
         "trials")  # fmt: skip


def write_report(study: Study, paths: Paths, file: str) -> str:
    """Return Markdown of the study of `file`; RESULTS/NAME.md has it, with plots beside it.

    Raises ConfigError: there is no run of the baseline in the last stage; or matplotlib is missing.
    """
    name, progress = study_name(file), load_progress(study, paths)
    progress.require(progress.stages[-1][study.baseline], paths)
    *choosing, last = progress.stages
    best = {arm: ranked[0] for arm, ranked in last.items() if ranked}
    times = step_times(paths.results / f"{name}-steps.csv")
    seconds, how, times = _step_seconds(study, last, times)
    found = [one for ranked in last.values() for one in ranked]
    decoding = {one.candidate.name: _decode_flops(study, one, paths) for one in found}
    curves = Table(paths.results).curves()
    draw_curves(best, curves, seconds, paths.results / f"{name}-curves.svg")
    draw_cost(best, seconds, decoding, best[study.baseline], paths.results / f"{name}-cost.svg")
    parts = [
        f"# {study.question}",
        f"`python -m jtok_jax.study run --study={file} --data=FOLDER`, then `report`. "
        + _circumstances(last),
        final_table(progress.stages, best[study.baseline], seconds, times, decoding),
        "Mean and 95% interval (Student's t) over seeds; differences are taken seed by seed. "
        "eta: parameters of tables over those of the backbone. Trials: different runs "
        "that the values of the arm were chosen from; the lowest or highest of those tried may not "
        f"be the best there is. Step: seconds over the baseline's, {how}."
        + _lacking(progress.missing),
        f"![loss against steps, FLOPs and seconds]({name}-curves.svg)",
        f"![loss against parameters, seconds and FLOPs]({name}-cost.svg)",
        "## What each arm trains with",
        fields_table(best),
    ]
    for number, stage in enumerate(choosing, start=1):
        if any(len(ranked) > 1 for ranked in stage.values()):
            rows = [(arm, _chosen(one), _loss(one)) for arm, some in stage.items() for one in some]
            parts += [f"## Stage {number}: what was chosen from",
                      markdown_table(("arm", "varied", "val loss, nats/token"), rows)]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    (paths.results / f"{name}.md").write_text(text)
    return text


def final_table(
    stages: list[StageResults],
    base: Ranked,
    seconds: dict[str, float],
    times: dict[str, StepTime],
    decoding: dict[str, int],
) -> str:
    """Return Markdown of the last stage, a line a candidate, by loss; `base`: of the baseline.

    decoding: FLOPs of a token by candidate.
    """
    rows = []
    for one in sorted(itertools.chain(*stages[-1].values()), key=lambda one: one.loss):
        arm, first, time = one.candidate.arm, one.results[0], times.get(one.candidate.name)
        step = f"{seconds[one.candidate.name] / seconds[base.candidate.name]:.2f}"
        if time and time.low < time.high:
            step += f" ({time.low:.2f} to {time.high:.2f})"
        trials = {r.cell for stage in stages[:-1] for some in stage[arm.name] for r in some.results}
        rows.append([
            arm.name, _chosen(one, stages), len(one.results), _loss(one), _against(one, base),
            estimate([result.val_bpb for result in one.results]), f"{first.backbone / 1e6:.2f}M",
            f"{first.tables / 1e6:.2f}M", f"{first.tables / first.backbone:.2f}",
            f"{first.train_flops:.2e}", f"{decoding[one.candidate.name]:.2e}", step,
            max(len(trials) + arm.tried, 1),
        ])  # fmt: skip
    return markdown_table(FINAL, rows)


def _decode_flops(study: Study, one: Ranked, paths: Paths) -> int:
    """Return the forward FLOPs of a token; SCONE's are those of serving from its table."""
    config = resolve(cells(study, study.stages[-1], [one.candidate])[0], paths.root)
    return flops.count(config.model, seq_len=config.train.seq_len).forward_flops


def fields_table(best: dict[str, Ranked]) -> str:
    """Return Markdown of the fields of every arm on top of its file, chosen ones included."""
    rows = []
    for name, one in best.items():
        arm, chosen = one.candidate
        fields = sorted((dict(arm.fields) | dict(chosen)).items())
        shown = ", ".join(f"{key} {short(value)}" for key, value in fields)
        rows.append((name, arm.config, shown, arm.tried or ""))
    return markdown_table(("arm", "file", "fields", "chosen from elsewhere"), rows)


def paired(results: list[Result], baseline: list[Result]) -> Estimate | None:
    """Return the difference of validation losses, seed by seed; a seed is one order of the data.

    None if they have no seed in common.
    """
    losses = {result.seed: result.val_loss for result in baseline}
    differences = [one.val_loss - losses[one.seed] for one in results if one.seed in losses]
    return estimate(differences) if differences else None


def _lacking(names: list[str]) -> str:
    more = f"; and {len(names) - 6} more" * (len(names) > 6)
    return f" Failed or not yet run: {'; '.join(names[:6])}{more}." * bool(names)


def _loss(one: Ranked) -> str:
    if 0 < one.num_diverged < len(one.results):
        return f"{one.num_diverged} of {len(one.results)} diverged"
    return str(one.estimate)


def _against(one: Ranked, base: Ranked) -> str:
    if one == base:
        return ""
    if base.num_diverged:
        return "the baseline diverged"
    difference = paired(one.results, base.results)
    if not difference:
        return ""
    seeds, others = ({result.seed for result in some.results} for some in (one, base))
    common, most = len(seeds & others), max(len(seeds), len(others))
    fewer = f" ({common} of {most} seeds)" * (common < most)
    return "+" * (0 < difference.mean < np.inf) + str(difference) + fewer


def _step_seconds(
    study: Study, last: StageResults, times: dict[str, StepTime]
) -> tuple[dict[str, float], str, dict[str, StepTime]]:
    """Return seconds of a step of every candidate, how they were measured, and times that count.

    Paired times count where they are of these runs, as their fields tell, and of their device.
    """
    every = list(itertools.chain(*last.values()))
    devices = {result.device for one in every for result in one.results}
    wanted = {one.candidate.name: cells(study, study.stages[-1], [one.candidate])[0].key
              for one in every}  # fmt: skip
    timed = {name: time for name, time in times.items() if time.cell == wanted.get(name)}
    if timed.keys() == wanted.keys() and devices == {time.device for time in timed.values()}:
        baseline = [one.candidate.name for one in last[study.baseline]]
        base = next(time for name, time in timed.items() if name in baseline)
        seconds = {name: time.ratio * base.milliseconds / 1000 for name, time in timed.items()}
        how = f"median (10th to 90th percentile), paired over {base.rounds} rounds"
        return seconds, f"{how} ({base.device}, {base.commit})", times
    how = "as the runs found the machine" + ", of several kinds" * (len(devices) > 1)
    how += "; there are paired times, of other runs or another device" * bool(times)
    median = lambda one: float(np.median([result.step_seconds for result in one.results]))
    return {one.candidate.name: median(one) for one in every}, how, {}


def _circumstances(last: StageResults) -> str:
    results = [result for ranked in last.values() for one in ranked for result in one.results]
    named = lambda column: ", ".join(sorted({str(getattr(one, column)) for one in results}))
    return (
        f"{len(results)} runs of {results[0].tokens / 1e6:.2f}M tokens on {named('device')}; "
        f"seeds {named('seed')}; data {named('data')}; commits {named('commit')}."
    )


def _chosen(one: Ranked, stages: list[StageResults] = ()) -> str:
    """Return the values of what was varied, and whether one is at the end of those in `stages`."""
    shown = []
    others = [dict(x.candidate.chosen) for stage in stages for x in stage[one.candidate.arm.name]]
    for key, value in one.candidate.chosen:
        shown.append(f"{key.rsplit('.', 1)[-1]} {short(value)}")
        tried = {other[key] for other in others if isinstance(other.get(key), int | float)}
        if len(tried) > 1 and value in (min(tried), max(tried)):
            shown[-1] += f" ({'lowest' if value == min(tried) else 'highest'} of {len(tried)})"
    return ", ".join(shown)
