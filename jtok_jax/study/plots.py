# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Plots of a study: one colour an arm in all of them."""

import math
import pathlib

import numpy as np

from jtok_jax.errors import ConfigError
from jtok_jax.study.estimate import diverged, estimate
from jtok_jax.study.run import Ranked


def draw_curves(
    best: dict[str, Ranked], curves: dict[str, list], seconds: dict[str, float], path: pathlib.Path
) -> None:
    """Training losses, mean over seeds, of the best candidate of each arm."""
    figure, axes = _pyplot().subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    lowest, colors = math.inf, _colors(best)
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
            axis.plot(steps * scale, losses, color=colors[arm], label=f"{arm} {_ended(one)}")
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
    colors, bars = _colors(best), False
    crowded = (finite[-1] - finite[0]) / 20 if finite else 0
    for arm, one in best.items():
        losses = estimate([result.val_loss for result in one.results])
        if not math.isfinite(losses.mean):
            continue
        first = one.results[0]
        step = seconds[one.candidate.name] / seconds[baseline.candidate.name]
        places = (first.backbone + first.tables) / 1e6, step
        half = 0 if math.isnan(losses.half) else losses.half
        bars = bars or half > 0
        above = any(0 < loss - losses.mean < crowded for loss in finite)  # its label goes there
        for axis, place in zip(axes, places, strict=True):
            axis.errorbar(place, losses.mean, yerr=half, fmt="o", capsize=3, color=colors[arm])
            axis.annotate(
                arm, (place, losses.mean), xytext=(5, -11 if above else 4),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes[0].set(xscale="log", xlabel="parameters, tables included, millions")
    axes[0].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[0].xaxis.set_minor_locator(ticker.NullLocator())
    axes[0].xaxis.set_major_formatter("{x:g}")
    unpaired = "\n95% of each arm alone, not of differences" * bars
    axes[0].set_ylabel("validation loss, nats/token" + unpaired)
    axes[1].set_xlabel("seconds a step over the baseline's")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.margins(x=0.35)
    _save(figure, path)


def _colors(best: dict[str, Ranked]) -> dict[str, object]:
    """By loss, so that arms next to each other differ."""
    names = sorted(best, key=lambda arm: best[arm].loss)
    known = _pyplot().colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    return {name: known[place % len(known)] for place, name in enumerate(names)}


def _ended(one: Ranked) -> str:
    lost = diverged([result.val_loss for result in one.results])
    return f"{lost} of {len(one.results)} diverged" if lost else f"{one.loss:.3f}"


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
