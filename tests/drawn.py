# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Cases drawn at random, where all take long; NIGHTLY=1 (make nightly) takes all of them."""

import os
import random

from pythons import NIGHTLY

# Processes of one run draw alike: they inherit it.
SEED = int(os.environ.setdefault("LAYOUT_SEED", str(random.SystemRandom().randrange(1_000_000))))


def drawn(cases: list, count: int) -> list:
    """Return `count` of the cases in their order, all of them at night."""
    if NIGHTLY:
        return cases
    chosen = random.Random(SEED).sample(range(len(cases)), count)
    return [cases[index] for index in sorted(chosen)]
