# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Cases drawn at random, where all take long; NIGHTLY=1 (make nightly) takes all of them."""

import collections
import os
import random

from pythons import NIGHTLY

# Processes of one run draw alike: they inherit it.
SEED = int(os.environ.setdefault("LAYOUT_SEED", str(random.SystemRandom().randrange(1_000_000))))

# Files whose tests have many long cases: of each test one case in so many runs.
ONE_IN = {
    "test_anatomy": 2, "test_aot": 2, "test_arms": 2, "test_config": 3, "test_grouped_matmul": 2,
    "test_modulate": 3, "test_oracle": 2, "test_row_optimizers": 2, "test_signal": 2,
    "test_step": 2, "test_tools_across": 2,
}  # fmt: skip


def left_out(items: list) -> list:
    """Return the collected cases that are not drawn; no test loses all of its own."""
    cases, others = collections.defaultdict(list), []
    for item in items:
        skipped = any(mark.args and mark.args[0] for mark in item.iter_markers("skipif"))
        if item.path.stem in ONE_IN and not skipped and not NIGHTLY:
            cases[item.path.stem, item.originalname].append(item)
    for (file, _), found in cases.items():
        count = -(-len(found) // ONE_IN[file])
        chosen = random.Random(SEED).sample(found, count)
        others += [item for item in found if item not in chosen]
    return others


def drawn(cases: list, count: int) -> list:
    """Return `count` of the cases in their order, all of them at night."""
    if NIGHTLY:
        return cases
    chosen = random.Random(SEED).sample(range(len(cases)), count)
    return [cases[index] for index in sorted(chosen)]
