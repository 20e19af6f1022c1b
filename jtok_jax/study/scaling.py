# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The two scaling lines that arXiv 2602.00800 prints, and what they imply beside its claims."""

import math

import numpy as np

from jtok_jax.study.estimate import markdown_table

# The two lines as printed, log2 L = slope * log10 C + intercept with C in training FLOPs; the
# budgets; and what the paper claims, the gap in log2 L.
BASE, JTOK_M = (-0.2016, 5.1334), (-0.2009, 5.0881)
BUDGETS = np.array([3e18, 1e19, 3e19, 1e20, 3e20])
REDUCTION, GAP, SAVED = 0.022, 0.038, 0.352


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
