# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Plots of a study: one colour an arm in all of them."""

import math
import pathlib

import numpy as np

from jtok_jax.errors import ConfigError
from jtok_jax.study.run import Ranked


def draw_curves(
    best: dict[str, Ranked], curves: dict[str, list], seconds: dict[str, float], path: pathlib.Path
) -> None:
    """Draw training losses, mean over seeds, of the best candidate of each arm."""
    figure, colors, shown = new_figure(12, 4), _colors(best), []
    axes = figure.subplots(1, 3, sharey=True)
    for arm, one in sorted(best.items(), key=lambda item: item[1].loss):
        finished = [result.cell for result in one.results if result.status == "finished"]
        of_seeds = [np.transpose(curves[cell]) for cell in finished if cell in curves]
        if not of_seeds:
            continue
        steps = of_seeds[0][0]
        losses = np.mean([np.interp(steps, *curve) for curve in of_seeds], axis=0)
        first, ended = one.results[0], f"{one.loss:.3f}"
        shown += losses[np.isfinite(losses)].tolist()
        if one.num_diverged:
            ended = f"{one.num_diverged} of {len(one.results)} diverged"
        scales = 1, first.train_flops / first.steps, seconds[one.candidate.name]
        for axis, scale in zip(axes, scales, strict=True):
            axis.plot(steps * scale, losses, color=colors[arm], label=f"{arm} {ended}")
    for axis, label in zip(axes, ("steps", "training FLOPs", "seconds of steps"), strict=True):
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="training loss, nats/token")
    if shown:  # not all diverged
        axes[0].set_ylim(min(shown) - 0.05, min(min(shown) + 2, max(shown) + 0.05))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small",
        title="validation at the end", title_fontsize="small",
    )  # fmt: skip
    save(figure, path)


def draw_cost(
    best: dict[str, Ranked], seconds: dict[str, float], decoding: dict[str, int], baseline: Ranked,
    path: pathlib.Path,
) -> None:  # fmt: skip
    """Draw validation loss against parameters, FLOPs of training and of decoding, and step time.

    decoding: FLOPs of a token by candidate.
    """
    figure, colors, bars = new_figure(11, 8), _colors(best), False
    axes = figure.subplots(2, 2, sharey=True).ravel()
    finite = sorted(one.loss for one in best.values() if math.isfinite(one.loss))
    crowded = (finite[-1] - finite[0]) / 20 if finite else 0
    for arm, one in best.items():
        if not math.isfinite(one.loss):
            continue
        first, half, name = one.results[0], np.nan_to_num(one.estimate.half), one.candidate.name
        size, other = (first.backbone + first.tables) / 1e6, baseline.candidate.name
        bars |= bool(half)
        above = any(0 < loss - one.loss < crowded for loss in finite)  # its label goes there
        trained = first.train_flops / baseline.results[0].train_flops
        places = size, seconds[name] / seconds[other], trained, decoding[name] / decoding[other]
        for axis, place in zip(axes, places, strict=True):
            axis.errorbar(place, one.loss, yerr=half, fmt="o", capsize=3, color=colors[arm])
            axis.annotate(
                arm, (place, one.loss), xytext=(5, -11 if above else 4),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes[0].set_xscale("log", subs=())
    axes[0].xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes[0].xaxis.set_major_formatter("{x:g}")
    unpaired = "\n95% of each arm alone, not of differences" * bars
    labels = (
        "parameters, tables included, millions", "seconds a step over the baseline's",
        "training FLOPs over the baseline's", "FLOPs to decode a token over the baseline's",
    )  # fmt: skip
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.margins(x=0.35)
    for axis in axes[1:]:  # ratios, of which some per cent must look like some per cent
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, 0.8), max(high, 1.3))
    for axis in (axes[0], axes[2]):
        axis.set_ylabel("validation loss, nats/token" + unpaired)
    save(figure, path)


def _colors(best: dict[str, Ranked]) -> dict[str, object]:
    """Return colours by loss, so that arms next to each other differ."""
    from matplotlib import colormaps

    names = sorted(best, key=lambda arm: best[arm].loss)
    known = colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    return {name: known[place % len(known)] for place, name in enumerate(names)}


def new_figure(width: float, height: float):
    """Return an empty Figure of matplotlib. Raises ConfigError where that is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("Plots need matplotlib: pip install -e '.[plot]'.") from error
    matplotlib.rcParams["svg.hashsalt"] = "jtok_jax"  # the same figures give the same file
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: pathlib.Path) -> None:
    """Write a figure, without the date."""
    figure.savefig(path, metadata={"Date": None})
