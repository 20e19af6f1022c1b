# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What size of dense model each arm is worth: N_eff, gamma and how it depends on eta and rho.

All runs of a study see the same tokens, so the baseline's losses over its sizes are one curve; the
size at which it meets an arm's loss is N_eff = N_c (1 + eta gamma), Eq. 14 of arXiv 2602.00800.
At a fixed number of tokens Eq. 5 bends over log parameters: between sizes the curve is a monotone
cubic through them (PCHIP), beyond them the line through the outer two. N_c is all of the backbone:
the paper does not say whether embedding and head count. Intervals are of 95%: of a gain over seeds,
each read off its own baselines; of the law over candidates, whose common baselines are not drawn.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from jtok_jax.errors import ConfigError
from jtok_jax.study.estimate import estimate
from jtok_jax.study.results import Result
from jtok_jax.study.run import Ranked, StageResults, finished
from jtok_jax.study.scaling import GammaLaw, bootstrap, fit_gamma, gamma
from jtok_jax.study.spec import Study, cells, resolve, study_name
from jtok_jax.study.trainer import Places

SIZES = 3  # of the baseline, at least


class Worth(NamedTuple):
    """Of one candidate, mean over seeds."""

    name: str
    loss: float
    eta: float  # parameters of tables over those of the backbone
    rho: float  # K / n_e of JTok-M and of the arm `mixture`, else 1
    gain: float  # N_eff / N_c; nan if it diverged, infinite where no float holds it
    inside: bool  # N_eff is among the baseline's sizes; else extrapolated
    half: float  # of the interval of log gain over seeds; nan for one seed

    def __str__(self) -> str:
        with np.errstate(over="ignore"):
            low, high = self.gain * np.exp([-self.half, self.half])
        interval = "" if math.isnan(self.half) else f" ({low:.3f} to {high:.3f})"
        return f"{self.gain:.3f}{interval}" + " *" * (not self.inside)


def write_fit(study: Study, places: Places, file: str) -> str:
    """Markdown, also as RESULTS/NAME-fit.md.

    The arms that share the baseline's config file are its sizes.

    Raises:
        ConfigError: fewer than `SIZES` of these, or runs are missing.
    """
    (*_, last), lacking = finished(study, places)
    if lacking:
        raise ConfigError(f"Runs are missing: {'; '.join(lacking[:3])} ... Run the study first.")
    sizes, found = worth(study, last, places)
    losses = "; ".join(f"{size / 1e6:.2f}M {loss:.4f}" for size, loss in sizes)
    lines = [
        f"# {study.question}",
        f"`python -m jtok_jax.study fit --study={file}`. Baseline, parameters and loss: {losses}; "
        "N_eff: the size at which it has the arm's loss, on a monotone cubic of log loss over "
        "log N through the sizes; * beyond them, on the line through the outer two; its interval "
        "is Student's over seeds, if there are several and every seed's baselines fall. eta: "
        "parameters of tables over N_c, the backbone. "
        "gamma = (N_eff / N_c - 1) / eta.",
        "| candidate | val loss | eta | rho | N_eff / N_c | gamma |\n|---|---|---|---|---|---|",
    ]
    for one in found:
        ratios = f"diverged | {one.eta:.2f} | {one.rho:.2f} | |"
        if math.isfinite(one.loss):
            known = one.eta and 0 < one.gain < math.inf
            value = f"{gamma(one.gain, one.eta):.3f}" if known else ""
            ratios = f"{one.loss:.4f} | {one.eta:.2f} | {one.rho:.2f} | {one} | {value}"
        lines[-1] += f"\n| {one.name} | {ratios} |"
    lines.append(_gamma_law([one for one in found if one.eta and math.isfinite(one.loss)]))
    text = "\n\n".join(lines) + "\n"
    (places.results / f"{study_name(file)}-fit.md").write_text(text)
    return text


def worth(
    study: Study, last: StageResults, places: Places
) -> tuple[list[tuple[int, float]], list[Worth]]:
    """The baseline's sizes with their losses, and what every other candidate is worth on them."""
    (base,) = [arm for arm in study.arms if arm.name == study.baseline]
    names = {arm.name for arm in study.arms if arm.config == base.config}
    sizes = sorted((last[name][0].results[0].backbone, last[name][0].loss) for name in names)
    counts, losses = (np.array(values) for values in zip(*sizes, strict=True))
    if len(set(counts.tolist())) < SIZES:
        raise ConfigError(
            f"The baseline {study.baseline} has {len(set(counts.tolist()))} sizes (arms of "
            f"{base.config}); a curve through them needs {SIZES}."
        )
    if not np.all(np.diff(counts)):
        raise ConfigError(f"Two arms of {base.config} have one size: {sizes}. Leave one of them.")
    if not _falls(losses):
        raise ConfigError(
            f"The baseline's losses do not fall with its size: {sizes}. Tune each size, or average "
            "over more seeds."
        )
    found, of_seeds = [], _curves([last[name][0].results for name in names])
    for one in [one for name, some in last.items() if name not in names for one in some]:
        first, inside = one.results[0], bool(losses[-1] <= one.loss <= losses[0])
        eta, log_size = first.tables / first.backbone, _log_size(one.loss, counts, losses)
        with np.errstate(over="ignore"):
            gain = float(np.exp(log_size - math.log(first.backbone)))
        logs = [
            _log_size(result.val_loss, counts, of_seeds[result.seed])
            for result in one.results
            if result.seed in of_seeds
        ]
        half = estimate(logs).half if logs else math.nan
        rho = _rho(study, one, places)
        found.append(Worth(one.candidate.name, one.loss, eta, rho, gain, inside, half))
    return sizes, found


def _curves(sizes: list[list[Result]]) -> dict[int, np.ndarray]:
    """Losses over the sizes by seed that all have; {} if one does not fall, as noise is larger.

    To leave out such a seed alone would leave out the noise.
    """
    sizes = sorted(sizes, key=lambda results: results[0].backbone)
    losses = [{result.seed: result.val_loss for result in results} for results in sizes]
    common = set.intersection(*map(set, losses))
    curves = {seed: np.array([size[seed] for size in losses]) for seed in common}
    return curves if all(map(_falls, curves.values())) else {}


def _falls(losses: np.ndarray) -> bool:
    return bool(np.all(np.isfinite(losses)) and np.all(np.diff(losses) < 0))


def _log_size(loss: float, counts: np.ndarray, losses: np.ndarray) -> float:
    """log N at `loss`, on a monotone cubic through the sizes; outside a line through two."""
    if not math.isfinite(loss):
        return math.nan
    x, y, at = -np.log(losses), np.log(counts), -math.log(loss)
    if x[0] <= at <= x[-1]:
        return float(PchipInterpolator(x, y)(at))
    (x0, x1), (y0, y1) = (v[:2] if at < x[0] else v[-2:] for v in (x, y))
    return float(y0 + (at - x0) * (y1 - y0) / (x1 - x0))


def _rho(study: Study, one: Ranked, places: Places) -> float:
    (first, *_) = cells(study, study.stages[-1], {"": [one.candidate]})
    model = resolve(first, places.root).model
    mixture = model.arms.mixture if "mixture" in model.arms.chosen() else None
    routed = model.jtok if model.jtok.kind == "jtok_m" else mixture
    return routed.top_k / routed.num_tables if routed else 1.0


def _gamma_law(found: list[Worth]) -> str:
    points = [(one.eta, one.rho, one.gain) for one in found]
    fit = lambda points: fit_gamma(*np.reshape(points, (-1, 3)).T)
    try:
        law = fit(points)
    except ValueError as error:
        return f"No law of gamma over eta and rho: {error}"
    beyond = sum(not one.inside for one in found)
    return (
        f"gamma = {law.scale:.3f} eta^{law.eta_exponent:.3f} rho^{law.rho_exponent:.3f}, r2 "
        f"{law.r2:.3f}, over {len(found)} candidates, {beyond} of them beyond the sizes trained; "
        f"{_law_intervals(fit, points)}; the form is ours, the paper gives none."
    )


def _law_intervals(fit: Callable[[list], GammaLaw], points: list[tuple]) -> str:
    try:
        found = bootstrap(lambda drawn: fit(drawn)[:3], points, samples=1000, seed=0)
    except ValueError as error:
        return f"no interval ({error})"
    names, ends = ("factor", "exponent of eta", "of rho"), zip(found.low, found.high, strict=True)
    none = f" ({found.failed} of 1000 draws determine no law)" * bool(found.failed)
    return f"95%, candidates drawn again{none}: " + ", ".join(
        f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in zip(names, ends, strict=True)
    )
