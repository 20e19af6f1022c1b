# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""gamma over eta and rho is found again, with intervals; the printed lines imply what we say."""

import math

import numpy as np
import pytest
from pythons import oldest

from jtok_jax.study.fit import fit_gamma, gamma_intervals, published_table

pytestmark = oldest
ETA, RHO = map(np.ravel, np.meshgrid((1, 5, 20, 100), (0.2, 0.25, 0.5)))
GAMMA = 0.05 * ETA**-0.3 * RHO**-0.7


def noisy(seed, sigma=0.05):
    noise = np.random.default_rng(seed).normal(size=ETA.size)
    return 1 + ETA * GAMMA * np.exp(sigma * noise)


def test_gamma_is_found():
    np.testing.assert_allclose(fit_gamma(ETA, RHO, 1 + ETA * GAMMA), (0.05, -0.3, -0.7, 1))
    rough = fit_gamma(ETA, RHO, noisy(3))
    np.testing.assert_allclose(rough[1:3], (-0.3, -0.7), atol=0.1)
    assert 0.9 < rough[3] < 1 - 1e-6


def test_intervals_cover_gamma_about_as_often_as_they_say():
    covered = []
    for seed in range(30):
        low, high, failed = gamma_intervals(ETA, RHO, noisy(seed))
        covered.append((low < (0.05, -0.3, -0.7)) & (high > (0.05, -0.3, -0.7)))
        assert failed == 0
    assert 0.8 < np.mean(covered) < 0.98  # few points make them too narrow
    np.testing.assert_array_equal(gamma_intervals(ETA, RHO, noisy(29))[:2], [low, high])


def test_resamples_without_a_law_are_counted():
    three = [0, 3, 8]  # the least that have a law: 1000 (1 - 3! / 3^3) = 778 draws have none
    with pytest.raises(ValueError, match=r"7\d\d of 1000 resamples fail .*determine .*more points"):
        gamma_intervals(ETA[three], RHO[three], noisy(0)[three])
    four = [0, 3, 8, 11]
    assert 300 < gamma_intervals(ETA[four], RHO[four], noisy(0)[four])[2] < 500


@pytest.mark.parametrize(("rho", "gain", "message"), [
    ([0.5, 0.4, 0.2], [2, 0.9, 4], "gain has 0.9.* Average"),
    ([0.5, 0.4, 0.2], [2, np.inf, 4], "finite"),
    ([0.25] * 3, [2, 3, 4], "3 points determine 2 of 3"),
])  # fmt: skip
def test_gains_without_a_law_are_refused(rho, gain, message):
    with pytest.raises(ValueError, match=message):
        fit_gamma(np.array([1, 5, 9]), np.array(rho), np.array(gain))


def test_published_table_says_what_the_printed_lines_imply():
    *lines, _, sentence = published_table().splitlines()
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
