# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The two scaling lines that arXiv 2602.00800 prints, and what they imply beside its claims."""

import math
from typing import NamedTuple


class PowerLaw(NamedTuple):
    """log2 L = slope * log10 C + intercept; C in training FLOPs."""

    slope: float
    intercept: float

    def loss(self, compute: float) -> float:
        """Return the loss at `compute`."""
        return 2 ** (self.slope * math.log10(compute) + self.intercept)

    def compute(self, loss: float) -> float:
        """Return the compute that reaches `loss`."""
        return 10 ** ((math.log2(loss) - self.intercept) / self.slope)


# The paper's two lines as printed, its budgets, and what it claims; the gap is in log2 L.
BASE, JTOK_M = PowerLaw(-0.2016, 5.1334), PowerLaw(-0.2009, 5.0881)
BUDGETS = (3e18, 1e19, 3e19, 1e20, 3e20)
REDUCTION, GAP, SAVED = 0.022, 0.038, 0.352


def published_table() -> str:
    """Return Markdown of what the printed lines imply at the five budgets, beside the claims."""
    titles = "compute, FLOPs | base loss | JTok-M loss | loss reduction | compute saved"
    rows, gaps = [f"| {titles} |", "|---|---|---|---|---|"], []
    for budget in BUDGETS:
        base, tables = BASE.loss(budget), JTOK_M.loss(budget)
        saved = 1 - JTOK_M.compute(base) / budget  # Eq. 17
        gaps.append(math.log2(base / tables))
        losses = f"{base:.4f} | {tables:.4f} | {1 - tables / base:.2%}"
        rows.append(f"| {budget:.0e} | {losses} | {saved:.1%} |".replace("e+", "e"))
    implied = 1 - 10 ** (-math.log2(1 - REDUCTION) / BASE.slope)
    return "\n".join(rows) + (
        f"\n| claimed | | | {REDUCTION:.1%} | {SAVED:.1%} |\n\n"
        f"The claimed saving is 1 - 10^({GAP} / {BASE.slope}), from a gap of {GAP} in log2 L. The "
        f"printed lines differ by {max(gaps):.4f} to {min(gaps):.4f} at these budgets, and by "
        f"{BASE.intercept - JTOK_M.intercept:.4f} at log10 C = 0. A gap of {GAP} would be "
        f"{1 - 2**-GAP:.1%} less loss, not the {REDUCTION:.1%} claimed, which is worth "
        f"{implied:.1%}.\n"
    )
