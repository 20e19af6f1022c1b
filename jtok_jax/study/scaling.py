# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Scaling laws from finished runs: optima at equal compute, frontiers, what tables are worth.

C is in training FLOPs, N_c in backbone parameters, D in tokens, losses in nats or bits; points are
arrays [P], fits least squares in the logarithm. Equations: arXiv 2602.00800, from public notes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares


class Optimum(NamedTuple):
    """Best N_c of one compute budget and its loss; `curvature` is d2 log2 L / d(log10 N_c)2.

    Not `inside` the sizes that were trained, it is extrapolated and belongs in no frontier.
    """

    parameters: float
    loss: float
    curvature: float
    r2: float
    inside: bool


class PowerLaw(NamedTuple):
    """log2 L = slope * log10 C + intercept."""

    slope: float
    intercept: float
    r2: float

    def loss(self, compute: ArrayLike) -> np.ndarray:
        """Loss at `compute` FLOPs, in their shape."""
        return np.exp2(self.slope * np.log10(_positive("compute", compute)) + self.intercept)

    def compute(self, loss: ArrayLike) -> np.ndarray:
        """FLOPs that reach `loss`, in its shape; infinite where no float holds them."""
        with np.errstate(over="ignore"):
            return 10 ** ((np.log2(_positive("loss", loss)) - self.intercept) / self.slope)


class Law(NamedTuple):
    """L(N_c, D) = [(A / N_c)^(alpha / beta) + B / D]^beta (Eq. 5); no loss is irreducible."""

    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """Loss of N_c `parameters` after D `tokens`, in their common shape."""
        sizes = _positive("parameters", parameters), _positive("tokens", tokens)
        return np.exp(_log_loss(np.log(self), *map(np.log, sizes)))


class GammaLaw(NamedTuple):
    """gamma = scale * eta^eta_exponent * rho^rho_exponent."""

    scale: float
    eta_exponent: float
    rho_exponent: float
    r2: float

    def predict(self, eta: ArrayLike, rho: ArrayLike) -> np.ndarray:
        """gamma at `eta` = N_n / N_c and `rho` = K / n_e, in their common shape."""
        eta, rho = _positive("eta", eta), _positive("rho", rho, most=1)
        return self.scale * eta**self.eta_exponent * rho**self.rho_exponent


class Interval(NamedTuple):
    """`estimate` from all points; `low` and `high` from resamples, of which `failed` had no fit."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    failed: int


class Published(NamedTuple):
    """The paper's two frontiers as printed, and what it claims of them; the gap is in log2 L."""

    base: PowerLaw = PowerLaw(slope=-0.2016, intercept=5.1334, r2=0.9994)
    jtok_m: PowerLaw = PowerLaw(slope=-0.2009, intercept=5.0881, r2=0.9991)
    budgets: tuple[float, ...] = (3e18, 1e19, 3e19, 1e20, 3e20)
    claimed_reduction: float = 0.022
    claimed_gap: float = 0.038
    claimed_saving: float = 0.352


PUBLISHED = Published()


def iso_flop_optimum(parameters: ArrayLike, losses: ArrayLike) -> Optimum:
    """Minimum of a parabola in log10 N_c through the log2 losses of one compute budget.

    In log2 L, as `power_law` is, its curvature is the same in nats and bits; the notes do not say
    whether the paper's parabolas are in L. ValueError: fewer than 3 sizes, or no minimum.
    """
    size, loss = _points(3, parameters=parameters, losses=losses)
    x = np.log10(size)
    middle, half = (x.min() + x.max()) / 2, max(np.ptp(x) / 2, 1e-9)
    t = (x - middle) / half
    (level, slope, bend), r2 = _linear_fit(np.log2(loss), t, t**2)
    # A bend under 1e-12 is rounding; no float holds an optimum that is 300 decades away.
    if bend < 1e-12 or abs(half * slope / bend / 2) + abs(middle) > 300:
        found = f"The parabola has no minimum: its t^2 has {bend:.3g}, where t is -1 to 1"
        raise ValueError(f"{found}. Train sizes on both sides of the best, or average seeds.")
    best = -slope / bend / 2
    where, least = 10 ** (middle + half * best), 2 ** (level + slope * best / 2)
    return Optimum(*map(float, (where, least, 2 * bend / half**2, r2)), bool(abs(best) <= 1))


def power_law(compute: ArrayLike, losses: ArrayLike) -> PowerLaw:
    """The line log2 L = slope * log10 C + intercept through the best losses of several budgets.

    ValueError: fewer than 2 budgets, or losses that do not fall with compute.
    """
    budget, loss = _points(2, compute=compute, losses=losses)
    (intercept, slope), r2 = _linear_fit(np.log2(loss), np.log10(budget))
    if slope >= 0:
        found = f"log2 loss changes by {slope:.3g} a decade of compute, where it must fall"
        raise ValueError(f"{found}. Widen the range of budgets, or average seeds.")
    return PowerLaw(float(slope), float(intercept), r2)


def fit_law(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> Law:
    """L(N_c, D) of Eq. 5, the best of several starts; how the paper fits it is not known.

    Fitted are the logs of A, B, alpha and beta, the exponents within 0.01 to 100. ValueError: fewer
    than 5 points (4 have several solutions), N_c and D constant or tied, or no determined fit.
    """
    size, data, loss = _points(5, parameters=parameters, tokens=tokens, losses=losses)
    middle = np.log(size).mean(), np.log(data).mean()
    n, d, y = np.log(size) - middle[0], np.log(data) - middle[1], np.log(loss)
    most = np.array([300, 300, math.log(100), math.log(100)])
    exponents = [(alpha, beta) for alpha in (0.1, 0.5) for beta in (0.1, 0.5)]
    starts = [[y.mean() / a, y.mean() / b, math.log(a), math.log(b)] for a, b in exponents]
    tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14) | {"bounds": (-most, most)}
    residual = lambda x: _log_loss(x, n, d) - y
    fits = [least_squares(residual, start, jac="3-point", **tight) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    spread = np.linalg.svd(best.jac, compute_uv=False)
    tied = np.linalg.svd([n, d], compute_uv=False)[-1] < 1e-6
    if tied or spread[-1] < 1e-7 * spread[0] or np.any(abs(best.x) > 0.99 * most):
        raise ValueError(
            f"{y.size} points do not determine A, B, alpha and beta (singular values "
            f"{spread[0]:.1e} to {spread[-1]:.1e}, exponents {np.exp(best.x[2:])}). Vary N_c and D "
            "independently, over a decade or more each."
        )
    return Law(*np.exp(best.x + np.array([*middle, 0, 0])).tolist())


def effective_gain(
    law: Law, parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike
) -> np.ndarray:
    """1 + eta * gamma [P]: N_eff / N_c of Eq. 14, by which A shrinks to explain a loss (Eq. 15).

    `law` is the backbone's without tables; `parameters` leaves tables out too. ValueError: a loss
    below what `law` gives a backbone of any size.
    """
    size, data, loss = _points(1, parameters=parameters, tokens=tokens, losses=losses)
    room = loss ** (1 / law.beta) - law.B / data
    if np.any(room <= 0):
        at = int(np.argmax(room <= 0))
        raise ValueError(
            f"losses[{at}] is {loss[at]:.6g}; after {data[at]:g} tokens the law gives a backbone "
            f"of any size more than {(law.B / data[at]) ** law.beta:.6g}, so no gain explains it. "
            "Fit the law on runs with as many tokens."
        )
    return law.A / size * room ** (-law.beta / law.alpha)


def gamma(gain: ArrayLike, eta: ArrayLike) -> np.ndarray:
    """gamma of Eq. 14 from `gain` = 1 + eta * gamma and `eta` = N_n / N_c."""
    return (_positive("gain", gain) - 1) / _positive("eta", eta)


def fit_gamma(eta: ArrayLike, rho: ArrayLike, gain: ArrayLike) -> GammaLaw:
    """gamma(eta, rho) = g * eta^a * rho^b from gains of `effective_gain`.

    Differs from the paper, which writes gamma(rho) and gives no functional form; with one gamma for
    all eta, its figures at one size contradict its Eq. 16. A power of each is our choice.
    ValueError: fewer than 3 points, a gain of 1 or less, or eta and rho constant or tied.
    """
    eta, rho, gain = _points(3, eta=eta, rho=_positive("rho", rho, most=1), gain=gain)
    if np.any(gain <= 1):
        found = f"gain has {gain.min():.6g}, where a power of eta and rho needs more than 1"
        raise ValueError(f"{found}. Average seeds: leaving such runs out would bias the fit.")
    (scale, a, b), r2 = _linear_fit(np.log(gamma(gain, eta)), np.log(eta), np.log(rho))
    return GammaLaw(math.exp(scale), float(a), float(b), r2)


def saving(base: PowerLaw, other: PowerLaw, compute: ArrayLike) -> np.ndarray:
    """1 - C_other / C at the loss that `base` reaches with `compute`, in its shape (Eq. 17)."""
    return 1 - other.compute(base.loss(compute)) / np.asarray(compute)


def bootstrap(
    fit: Callable[..., ArrayLike],
    *strata: Sequence,
    samples: int = 1000,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of `fit(*strata)`, a number or an array, over resampled points.

    A point is whatever `fit` takes: a run, or all runs of a seed or a budget that share noise.
    Each stratum is drawn from by itself, with replacement, and keeps its size. Resamples for which
    `fit` raises a ValueError or is not finite are left out. Few points make it too narrow: at 0.95
    the truth was within in 89% of synthetic studies with 5 runs a model, 94% with 30, 78% with 3
    points that are seeds of 5 runs each. ValueError: over half fail, or `samples` too few.
    """
    if not 0 < level < 1 or samples < 1.999 / (1 - level):
        limits = "level must lie between 0 and 1, samples be 2 / (1 - level) or more"
        raise ValueError(f"level {level:g}, samples {samples}; {limits}. Try 0.95 and 1000.")
    estimate, generator, values = np.asarray(fit(*strata)), np.random.default_rng(seed), []
    for _ in range(samples):
        draws = [[p[i] for i in generator.integers(len(p), size=len(p))] for p in strata]
        try:
            values.append(np.asarray_chkfinite(fit(*draws)))
        except ValueError as error:  # as of one point drawn alone: counted, and half is too many
            reason = error
    failed = samples - len(values)
    if failed > samples / 2:
        raise ValueError(f"{failed} of {samples} resamples fail ({reason}). Bring more points.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(estimate, low, high, failed)


def saving_interval(
    base_points: Sequence, other_points: Sequence, compute: ArrayLike, **options
) -> Interval:
    """`saving` between the power laws of two sets of points, with the interval of `bootstrap`.

    A point is [2] (FLOPs, loss), or [R, 2] of runs drawn together, such as all of one seed. The two
    sets are drawn independently. `options`: samples, seed and level.
    """
    line = lambda points: power_law(*np.vstack([np.asarray(point) for point in points]).T)
    fit = lambda base, other: saving(line(base), line(other), compute)
    return bootstrap(fit, base_points, other_points, **options)


def published_table() -> str:
    """Markdown of what the printed lines imply at the five budgets, beside the claims."""
    base, other, budgets, reduction, gap, saved = PUBLISHED
    titles = ("compute, FLOPs", "base loss", "JTok-M loss", "loss reduction", "compute saved")
    rows = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|"]
    for budget in budgets:
        first, second = base.loss(budget), other.loss(budget)
        losses = f"{first:.4f} | {second:.4f} | {1 - second / first:.2%}"
        rows.append(f"| {budget:.0e} | {losses} | {saving(base, other, budget):.1%} |")
    gaps = np.log2(base.loss(budgets) / other.loss(budgets))
    implied = 1 - 10 ** (-np.log2(1 - reduction) / base.slope)
    return "\n".join(rows).replace("e+", "e") + (
        f"\n| claimed | | | {reduction:.1%} | {saved:.1%} |\n\n"
        f"The claimed saving is 1 - 10^({gap} / {base.slope}), from a gap of {gap} in log2 L. The "
        f"printed lines differ by {gaps.max():.4f} to {gaps.min():.4f} at these budgets, and by "
        f"{base.intercept - other.intercept:.4f} at log10 C = 0. A gap of {gap} would be "
        f"{1 - 2**-gap:.1%} less loss, not the {reduction:.1%} claimed, which is worth "
        f"{implied:.1%}.\n"
    )


def _positive(name: str, values: ArrayLike, most: float = math.inf) -> np.ndarray:
    values = np.asarray(values, np.float64)
    good = np.isfinite(values) & (values > 0) & (values <= most)
    if not np.all(good):
        limit = "finite and above 0" if most == math.inf else f"above 0 and at most {most:g}"
        raise ValueError(f"{name} has {values[~good][0]:g}; must be {limit}. Drop or correct it.")
    return values


def _points(minimum: int, **arrays: ArrayLike) -> list[np.ndarray]:
    arrays = {name: _positive(name, values) for name, values in arrays.items()}
    shapes = {name: values.shape for name, values in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(s) != 1 or s[0] < minimum for s in shapes.values()):
        raise ValueError(f"Points have shapes {shapes}; give lists alike, of {minimum} or more.")
    return list(arrays.values())


def _linear_fit(target: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients of 1 and the columns, and R2: nan where the target does not vary."""
    matrix = np.stack([np.ones(target.size), *columns], axis=-1)
    fitted, _, rank, _ = np.linalg.lstsq(matrix, target, rcond=1e-9)
    if rank < matrix.shape[1]:
        found = f"{target.size} points determine {rank} of {matrix.shape[1]} coefficients"
        raise ValueError(f"{found}. Add points that differ, in each variable independently.")
    left, total = np.sum((target - matrix @ fitted) ** 2), np.sum((target - target.mean()) ** 2)
    return fitted, float(1 - left / total) if np.ptp(target) > 1e-12 else math.nan


def _log_loss(logs: ArrayLike, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """log L of Eq. 5 from the logs of (A, B, alpha, beta), of N_c and of D; never overflows."""
    alpha, beta = np.exp(logs[2]), np.exp(logs[3])
    return beta * np.logaddexp(alpha / beta * (logs[0] - n), logs[1] - d)
