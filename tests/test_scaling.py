# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Scaling fits: known laws are found again, the paper's equations hold, intervals cover."""

import math

import numpy as np
import pytest
from pythons import oldest

from jtok_jax.study import scaling
from jtok_jax.study.scaling import PUBLISHED, Law

pytestmark = oldest
TEN = np.geomspace(1e7, 1e9, 10)
THREE = np.array([[1e7, 1e8, 1e9], [3e9, 2e8, 1e9]]).repeat(2, axis=1)  # in 6 points
LAWS = [Law(3e6, 5e8, 0.12, 0.13), Law(9e13, 5e13, 0.076, 0.095), Law(1e7, 1e9, 0.5, 0.2)]
SIZES, TOKENS = map(np.ravel, np.meshgrid(np.geomspace(2e6, 1e9, 7), np.geomspace(1e8, 3e10, 5)))


def noisy(losses, sigma, seed):
    return losses * np.exp(sigma * np.random.default_rng(seed).normal(size=np.shape(losses)))


def test_parabola_is_found_in_any_unit():
    sizes = np.geomspace(1e7, 3e9, 7)
    losses = 2 ** (1.3 + 0.11 / 2 * (np.log10(sizes) - 8.2) ** 2)
    for unit in (1, 1 / math.log(2)):
        found = scaling.iso_flop_optimum(sizes, losses * unit)
        assert found.parameters == pytest.approx(10**8.2, rel=1e-9)
        assert found[1:] == pytest.approx((2**1.3 * unit, 0.11, 1, True), rel=1e-9)
    assert not scaling.iso_flop_optimum(sizes[-3:], losses[-3:]).inside  # 10^8.2 is left of them
    repeated = [scaling.iso_flop_optimum(sizes, noisy(losses, 0.002, k)) for k in range(50)]
    assert np.log10([one.parameters for one in repeated]).mean() == pytest.approx(8.2, abs=0.02)


def test_power_law_is_found_and_inverts():
    budgets = np.geomspace(1e17, 1e20, 5)
    found = scaling.power_law(budgets, PUBLISHED.base.loss(budgets))
    np.testing.assert_allclose(found, (-0.2016, 5.1334, 1), rtol=1e-9, err_msg="exact points")
    np.testing.assert_allclose(found.compute(found.loss(budgets)), budgets, rtol=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_law_is_found(law):
    written_out = ((law.A / SIZES) ** (law.alpha / law.beta) + law.B / TOKENS) ** law.beta
    np.testing.assert_allclose(law.loss(SIZES, TOKENS), written_out, rtol=1e-12)
    np.testing.assert_allclose(scaling.fit_law(SIZES, TOKENS, written_out), law, rtol=1e-6)
    points = np.stack([SIZES, TOKENS, noisy(written_out, 0.003, 5)], -1)
    exponents = lambda points: np.log(scaling.fit_law(*np.stack(points).T))
    found = scaling.bootstrap(exponents, points, samples=60, seed=0, level=0.96)
    assert np.all((found.low < np.log(law)) & (np.log(law) < found.high)), (np.log(law), found)
    assert found.high[2] - found.low[2] < 0.3  # of log alpha: narrow enough to say something


@pytest.mark.parametrize("law", LAWS)
def test_gain_shows_on_frontiers_as_equations_16_and_17_say(law):
    def frontier(law):
        best = []
        for product in budgets / 6:  # N_c D
            sizes = np.geomspace(1e2, 1e15, 26001)
            losses = law.loss(sizes, product / sizes)
            near = np.argmin(losses) + np.arange(-200, 201, 100)  # a fifth of a decade
            best.append(scaling.iso_flop_optimum(sizes[near], losses[near]))
        return scaling.power_law(budgets, [one.loss for one in best])

    gain, budgets = 1.44, np.array([1e18, 1e19, 1e20])
    base, tables = frontier(law), frontier(law._replace(A=law.A / gain))
    exponent = law.alpha * law.beta / (law.alpha + law.beta)
    assert base.slope == pytest.approx(-exponent * math.log2(10), rel=1e-5)
    assert tables.loss(1e19) / base.loss(1e19) == pytest.approx(gain**-exponent, rel=1e-5)
    assert scaling.saving(base, tables, 1e19) == pytest.approx(1 - 1 / gain, rel=1e-3)


@pytest.mark.parametrize("law", LAWS)
def test_gain_and_gamma_are_found(law):
    eta, rho = map(np.ravel, np.meshgrid((1, 5, 20, 100), (0.2, 0.25, 0.5)))
    sizes, tokens, true = SIZES[:12], TOKENS[:12], 1 + eta * 0.05 * eta**-0.3 * rho**-0.7
    losses = law.loss(sizes * true, tokens)  # Eq. 14: tables are a larger backbone
    gain = scaling.effective_gain(law, sizes, tokens, losses)
    # Where data bind, a loss hardly tells the size: rounding of 1e-16 grows to 1e-8.
    np.testing.assert_allclose(gain, true, rtol=1e-7, err_msg="gain")
    found = scaling.fit_gamma(eta, rho, gain)
    np.testing.assert_allclose(found, (0.05, -0.3, -0.7, 1), rtol=1e-6, err_msg="gamma")
    np.testing.assert_allclose(found.predict(7, 0.4), 0.05 * 7**-0.3 * 0.4**-0.7, rtol=1e-6)
    rough = scaling.fit_gamma(eta, rho, 1 + eta * noisy(scaling.gamma(true, eta), 0.05, 3))
    np.testing.assert_allclose(rough[1:3], (-0.3, -0.7), atol=0.1)
    assert rough.r2 < 1 - 1e-6


def test_interval_of_a_saving_covers_it_as_often_as_it_says():
    budgets = np.geomspace(1e17, 1e20, 30)
    truth, covered = scaling.saving(PUBLISHED.base, PUBLISHED.jtok_m, 1e19), 0
    for k in range(100):
        draw = lambda line, seed: np.stack([budgets, noisy(line.loss(budgets), 0.005, seed)], -1)
        points = draw(PUBLISHED.base, 2 * k), draw(PUBLISHED.jtok_m, 2 * k + 1)
        found = scaling.saving_interval(*points, 1e19, samples=100, seed=k, level=0.9)
        covered += found.low <= truth <= found.high
    assert 80 <= covered <= 97  # three standard errors below 90; half or twice as wide: 59 or 100


def test_bootstrap_repeats_by_seed_draws_groups_and_counts_failures():
    budgets = np.array([1e18, 1e19, 1e20])
    points = np.stack([budgets, noisy(PUBLISHED.base.loss(budgets), 0.01, 0)], -1)
    drawn = lambda seed: scaling.saving_interval(points, points, 1e19, samples=200, seed=seed)
    assert drawn(1) == drawn(1) != drawn(2)
    assert 0.1 < drawn(1).failed / 200 < 0.35  # thrice one budget, in either: 1 - (8 / 9)^2 = 0.21
    grouped = scaling.saving_interval([points] * 4, [points] * 2, budgets, samples=40, seed=0)
    np.testing.assert_allclose([grouped.low, grouped.high], 0, atol=1e-9)  # every draw is the same
    assert grouped.failed == 0
    with pytest.raises(ValueError, match=r"of 99 resamples fail .*determine 1 of 2.*more points"):
        scaling.saving_interval(points[:2], points[:2], 1e19, samples=99, seed=0)


@pytest.mark.parametrize(("message", "call"), {
    "shapes": lambda: scaling.iso_flop_optimum([1e7, 1e8], [3, 2]),
    "determine 2 of 3": lambda: scaling.iso_flop_optimum([1e7, 1e8, 1e8, 1e7], [3, 2, 2, 3]),
    "no minimum": lambda: scaling.iso_flop_optimum([1e7, 1e8, 1e9], [2, 3, 2]),
    "has 5.*e-14": lambda: scaling.iso_flop_optimum(TEN, 2.5 + 1e-13 * np.log10(TEN / 1e8) ** 2),
    "t is": lambda: scaling.iso_flop_optimum(TEN, np.exp(1e-5 * (np.log(TEN) - 5e3) ** 2)),
    "losses has inf": lambda: scaling.power_law([1e18, 1e19], [3, math.inf]),
    "must fall": lambda: scaling.power_law([1e18, 1e19], [2, 3]),
    "of 5 or more": lambda: scaling.fit_law(TEN[:4], TEN[:4], TEN[:4]),
    "Vary N_c and D": lambda: scaling.fit_law(TEN, 20 * TEN, LAWS[0].loss(TEN, 20 * TEN)),
    "do not determine": lambda: scaling.fit_law(*THREE, LAWS[1].loss(*THREE)),
    "no gain explains": lambda: scaling.effective_gain(LAWS[0], [1e8], [1e9], [0.9]),
    "rho has 2": lambda: scaling.fit_gamma([1, 5, 9], [0.5, 2, 0.2], [2, 3, 4]),
    "more than 1\\. Average": lambda: scaling.fit_gamma([1, 5, 9], [0.5, 0.4, 0.2], [2, 0.9, 4]),
    "each variable": lambda: scaling.fit_gamma([1, 5, 9], [0.25] * 3, [2, 3, 4]),
    "compute has -1": lambda: PUBLISHED.base.loss([1e18, -1]),
    "samples 30": lambda: scaling.bootstrap(np.mean, [1, 2], samples=30, seed=0),
}.items())  # fmt: skip
def test_bad_input_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_published_table_says_what_the_printed_lines_imply():
    *lines, _, sentence = scaling.published_table().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[7] == ["claimed", "", "", "2.2%", "35.2%"]
    for budget, row in zip((3e18, 1e19, 3e19, 1e20, 3e20), rows[2:7], strict=True):
        base = 2 ** (-0.2016 * math.log10(budget) + 5.1334)
        other = lambda log_compute: 2 ** (-0.2009 * log_compute + 5.0881)
        low, high = 15.0, 25.0  # log10 of the FLOPs at which the other line reaches that loss
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if other(middle) > base else (low, middle)
        reduction, saved = 1 - other(math.log10(budget)) / base, 1 - 10**low / budget
        assert [float(row[0]), float(row[1])] == pytest.approx([budget, base], abs=5e-5)
        assert row[3:] == [f"{reduction:.2%}", f"{saved:.1%}"]
    assert [rows[2][4], rows[6][4], "0.0324 to 0.0310" in sentence] == ["31.0%", "29.9%", True]
