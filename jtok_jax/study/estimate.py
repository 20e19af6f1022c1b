# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A mean over seeds and its interval."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


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


def diverged(losses: list[float]) -> int:
    """How many are not finite."""
    return sum(not math.isfinite(loss) for loss in losses)


def estimate(values: list[float], *, level: float = 0.95) -> Estimate:
    """Mean of independent `values` with Student's interval of probability `level`."""
    count, mean = len(values), float(np.mean(values))
    if count < 2 or not math.isfinite(mean):
        return Estimate(mean, float("nan"))
    deviation = float(np.std(values, ddof=1))
    return Estimate(mean, float(stats.t.ppf((1 + level) / 2, count - 1)) * deviation / count**0.5)
