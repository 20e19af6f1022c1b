# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A mean over seeds with its interval, and how tables show figures."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """Mean over seeds and half the width of its interval; nan for one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "unknown" if math.isnan(self.mean) else "diverged"
        return f"{self.mean:.4f}" + ("" if math.isnan(self.half) else f" +- {self.half:.4f}")


def estimate(values: list[float]) -> Estimate:
    """Return the mean of independent `values` with Student's interval of probability 95%."""
    mean = float(np.mean(values))
    if len(values) < 2 or not math.isfinite(mean):
        return Estimate(mean, math.nan)
    return Estimate(mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)))


def markdown_table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(list(head)), *lines[1:]])
