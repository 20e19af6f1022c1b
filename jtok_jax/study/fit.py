# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Computes what size of dense model each arm is worth: N_eff, gamma, its law, the paper's lines.

All runs of a study see the same tokens, so the baseline's losses over its sizes are one curve. The
size at which it meets an arm's loss is N_eff = N_c (1 + eta gamma), Eq. 14 of arXiv 2602.00800.
At a fixed number of tokens Eq. 5 bends over log parameters. So between sizes the curve is a
monotone cubic through them (PCHIP), beyond them the line through the outer two. N_c is all of the
backbone: the paper does not say whether embedding and head count. Intervals are of 95%: of a gain
over seeds, each read off its own baselines; of the law over candidates, baselines not drawn.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from jtok_jax.errors import ConfigError
from jtok_jax.study.estimate import estimate, markdown_table
from jtok_jax.study.run import Ranked, StageResults, load_progress
from jtok_jax.study.spec import Study, cells, resolve, study_name
from jtok_jax.study.trainer import Paths

SIZES = 3  # of the baseline, at least
RESAMPLES = 1000
# The two lines as printed: log2 L = slope * log10 C + intercept, C in training FLOPs. Then the
# budgets, and what the paper claims: the gap in log2 L.
BASE, JTOK_M = (-0.2016, 5.1334), (-0.2009, 5.0881)
BUDGETS = np.array([3e18, 1e19, 3e19, 1e20, 3e20])
REDUCTION, GAP, SAVED = 0.022, 0.038, 0.352


class Gain(NamedTuple):
    """The gain of one candidate, mean over seeds."""

    name: str
    loss: float
    eta: float  # parameters of tables over those of the backbone
    rho: float  # K / n_e of JTok-M, else 1
    gain: float  # N_eff / N_c; nan if it diverged, infinite where no float holds it
    inside: bool  # N_eff is among the baseline's sizes; else extrapolated
    half: float  # of the interval of log gain over seeds; nan for one seed

    def row(self) -> list[str]:
        """Return the cells of a line of the table."""
        first = [self.name, f"{self.loss:.4f}", f"{self.eta:.2f}", f"{self.rho:.2f}"]
        if not math.isfinite(self.loss):
            return [self.name, "diverged", *first[2:], "", ""]
        with np.errstate(over="ignore"):
            low, high = self.gain * np.exp([-self.half, self.half])
        interval = "" if math.isnan(self.half) else f" ({low:.3f} to {high:.3f})"
        known = self.eta and 0 < self.gain < math.inf
        gamma = f"{(self.gain - 1) / self.eta:.3f}" if known else ""
        return [*first, f"{self.gain:.3f}{interval}" + " *" * (not self.inside), gamma]


def write_fit(study: Study, paths: Paths, file: str) -> str:
    """Return Markdown of what arms are worth, written to RESULTS/NAME-fit.md, too.

    The arms that share the baseline's config file are its sizes.

    Raises ConfigError: fewer than `SIZES` of these, or runs are missing.
    """
    progress = load_progress(study, paths)
    progress.require(not progress.missing, paths)
    sizes = _sizes(study, progress.stages[-1])
    found = _gains(study, sizes, progress.stages[-1], paths)
    losses = "; ".join(f"{one.results[0].backbone / 1e6:.2f}M {one.loss:.4f}" for one in sizes)
    head = "candidate", "val loss", "eta", "rho", "N_eff / N_c", "gamma"
    text = "\n\n".join([
        f"# {study.question}",
        f"`python -m jtok_jax.study fit --study={file}`. Baseline, parameters and loss: {losses}; "
        "N_eff: the size at which it has the arm's loss, on a monotone cubic of log loss over "
        "log N through the sizes; * beyond them, on the line through the outer two; its interval "
        "is Student's over seeds, if there are several and every seed's baselines fall. eta: "
        "parameters of tables over N_c, the backbone. "
        "gamma = (N_eff / N_c - 1) / eta.",
        markdown_table(head, [one.row() for one in found]),
        _gamma_law([one for one in found if one.eta and math.isfinite(one.loss)]) + "\n",
    ])  # fmt: skip
    (paths.results / f"{study_name(file)}-fit.md").write_text(text)
    return text


def _sizes(study: Study, last: StageResults) -> list[Ranked]:
    """Return the best of each size of the baseline, checked, by size."""
    (config,) = [arm.config for arm in study.arms if arm.name == study.baseline]
    sizes = [last[arm.name][0] for arm in study.arms if arm.config == config]
    sizes.sort(key=lambda one: one.results[0].backbone)
    falling = _falls([one.loss for one in sizes]) and np.all(np.diff(_counts(sizes)))
    if len(sizes) < SIZES or not falling:
        raise ConfigError(
            f"Arms of {config} have sizes and losses "
            f"{[(one.results[0].backbone, round(one.loss, 4)) for one in sizes]}; a curve needs at "
            f"least {SIZES} different sizes, with losses that fall. Tune each, or average over "
            "more seeds."
        )
    return sizes


def _counts(sizes: list[Ranked]) -> np.ndarray:
    return np.array([one.results[0].backbone for one in sizes])


def _falls(losses: list[float]) -> bool:
    return bool(np.all(np.isfinite(losses)) and np.all(np.diff(losses) < 0))


def _gains(study: Study, sizes: list[Ranked], last: StageResults, paths: Paths) -> list[Gain]:
    """Return what every other candidate is worth on the curve through `sizes`."""
    counts, losses = _counts(sizes), [one.loss for one in sizes]
    of_size = [{result.seed: result.val_loss for result in one.results} for one in sizes]
    seeds = set.intersection(*map(set, of_size))
    curves = {seed: [size[seed] for size in of_size] for seed in seeds}
    if not all(map(_falls, curves.values())):
        curves = {}  # noise is larger; to leave out such a seed alone would leave out the noise
    gains, arms = [], {one.candidate.arm.name for one in sizes}
    for one in (one for name, some in last.items() if name not in arms for one in some):
        (cell,), first = cells(study, study.stages[-1], [one.candidate])[:1], one.results[0]
        jtok = resolve(cell, paths.root).model.jtok
        rho = jtok.top_k / jtok.num_tables if jtok.kind == "jtok_m" else 1.0
        in_curve = [result for result in one.results if result.seed in curves]
        logs = [log_size_at(result.val_loss, counts, curves[result.seed]) for result in in_curve]
        with np.errstate(over="ignore"):
            gain = float(np.exp(log_size_at(one.loss, counts, losses) - math.log(first.backbone)))
        gains.append(Gain(
            name=one.candidate.name, loss=one.loss, eta=first.tables / first.backbone, rho=rho,
            gain=gain, inside=losses[-1] <= one.loss <= losses[0],
            half=estimate(logs).half if logs else math.nan,
        ))  # fmt: skip
    return gains


def log_size_at(loss: float, counts: np.ndarray, losses: list[float]) -> float:
    """Return log N at `loss`, on a monotone cubic through the sizes; outside a line through two."""
    if not math.isfinite(loss):
        return math.nan
    x, y, at = -np.log(losses), np.log(counts), -math.log(loss)
    if x[0] <= at <= x[-1]:
        return float(PchipInterpolator(x, y)(at))
    (x0, x1), (y0, y1) = (v[:2] if at < x[0] else v[-2:] for v in (x, y))
    return float(y0 + (at - x0) * (y1 - y0) / (x1 - x0))


def _gamma_law(found: list[Gain]) -> str:
    """Return the law of gamma over eta and rho with its intervals, or why there is none."""
    points = np.reshape([(one.eta, one.rho, one.gain) for one in found], (-1, 3)).T
    try:
        scale, eta, rho, r2 = fit_gamma(*points)
    except ValueError as error:
        return f"No law of gamma over eta and rho: {error}"
    try:
        low, high, failed = gamma_intervals(*points)
        names = "factor", "exponent of eta", "of rho"
        ends = [f"{n} {a:.3f} to {b:.3f}" for n, a, b in zip(names, low, high, strict=True)]
        none = f" ({failed} of {RESAMPLES} draws determine no law)" * bool(failed)
        intervals = f"95%, candidates drawn again{none}: {', '.join(ends)}"
    except ValueError as error:
        intervals = f"no interval ({error})"
    beyond = sum(not one.inside for one in found)
    return (
        f"gamma = {scale:.3f} eta^{eta:.3f} rho^{rho:.3f}, r2 {r2:.3f}, over {len(found)} "
        f"candidates, {beyond} of them beyond the sizes trained; "
        f"{intervals}; the form is ours, the paper gives none."
    )


def fit_gamma(eta: np.ndarray, rho: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Return g, a, b and r2 of gamma = g eta^a rho^b, least squares in the logarithm of [P] gains.

    gain: N_eff / N_c = 1 + eta * gamma (Eq. 14), eta: N_n / N_c, rho: K / n_e.

    The paper writes gamma(rho) and gives no functional form. With one gamma for all eta, its
    figures at one size contradict its Eq. 16. A power of each is our choice.
    ValueError: fewer than 3 points, a gain of 1 or less, or eta and rho constant or tied.
    """
    if not np.all((gain > 1) & np.isfinite(gain)):
        found = f"gain has {gain.min():.6g}, where a power of eta and rho needs finite ones over 1"
        raise ValueError(f"{found}. Average seeds: leaving such runs out would bias the fit.")
    target = np.log((gain - 1) / eta)
    matrix = np.stack([np.ones(gain.size), np.log(eta), np.log(rho)], axis=-1)
    fitted, _, rank, _ = np.linalg.lstsq(matrix, target, rcond=1e-9)
    if rank < 3:
        found = f"{gain.size} points determine {rank} of 3 coefficients"
        raise ValueError(f"{found}. Add points that differ, in eta and rho independently.")
    left, total = np.sum((target - matrix @ fitted) ** 2), np.sum((target - target.mean()) ** 2)
    r2 = 1 - left / total if np.ptp(target) > 1e-12 else math.nan
    return np.array([math.exp(fitted[0]), *fitted[1:], r2])


def gamma_intervals(
    eta: np.ndarray, rho: np.ndarray, gain: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return ends [3] of 95% percentile intervals of `fit_gamma`, and how many resamples fail.

    Points are drawn again, with replacement; few of them make an interval too narrow. ValueError:
    over half of the resamples fail.
    """
    generator, laws = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = generator.integers(gain.size, size=gain.size)
        try:
            laws.append(fit_gamma(eta[drawn], rho[drawn], gain[drawn])[:3])
        except ValueError as error:  # as of one point drawn alone
            reason = error
    failed = RESAMPLES - len(laws)
    if failed > RESAMPLES / 2:
        raise ValueError(f"{failed} of {RESAMPLES} resamples fail ({reason}). Bring more points.")
    return *np.quantile(laws, [0.025, 0.975], axis=0), failed


def published_table() -> str:
    """Return Markdown of what the printed lines imply at the five budgets, beside the claims."""
    base, tables = (2 ** np.polyval(line, np.log10(BUDGETS)) for line in (BASE, JTOK_M))
    saved = 1 - 10 ** ((np.log2(base) - JTOK_M[1]) / JTOK_M[0]) / BUDGETS  # Eq. 17
    head = "compute, FLOPs", "base loss", "JTok-M loss", "loss reduction", "compute saved"
    rows = [
        (f"{c:.0e}".replace("e+", "e"), f"{b:.4f}", f"{t:.4f}", f"{1 - t / b:.2%}", f"{s:.1%}")
        for c, b, t, s in zip(BUDGETS, base, tables, saved, strict=True)
    ]
    gaps, implied = np.log2(base / tables), 1 - 10 ** (-math.log2(1 - REDUCTION) / BASE[0])
    return (
        f"{markdown_table(head, rows)}\n| claimed | | | {REDUCTION:.1%} | {SAVED:.1%} |\n\n"
        f"The claimed saving is 1 - 10^({GAP} / {BASE[0]}), from a gap of {GAP} in log2 L. The "
        f"printed lines differ by {max(gaps):.4f} to {min(gaps):.4f} at these budgets, and by "
        f"{BASE[1] - JTOK_M[1]:.4f} at log10 C = 0. A gap of {GAP} would be "
        f"{1 - 2**-GAP:.1%} less loss, not the {REDUCTION:.1%} claimed, which is worth "
        f"{implied:.1%}.\n"
    )
