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
    "test_anatomy": 2, "test_aot": 2, "test_arguments": 3, "test_arms": 5, "test_config": 12,
    "test_document_mask": 2, "test_generate": 3, "test_grouped_matmul": 3, "test_grow": 2,
    "test_host_tables": 3, "test_huggingface": 2, "test_jtok": 3, "test_mesh": 2,
    "test_modulate": 12, "test_moments": 2, "test_oracle": 3, "test_pattention": 2, "test_plan": 2,
    "test_planning": 3, "test_row_optimizers": 3, "test_scone": 2, "test_signal": 2,
    "test_stall": 2, "test_step": 5, "test_study": 2, "test_study_report": 2,
    "test_tools_across": 4, "test_train_loop": 3, "test_warm_start": 3,
}  # fmt: skip

# Files of tests of a minute or more: first, so that no worker is left with one at the end.
FIRST = (
    "test_hosts", "test_layouts", "test_hosts_fail", "test_resume", "test_tour", "test_lm_eval",
    "test_host_tables",
)  # fmt: skip


def left_out(items: list) -> list:
    """Return the collected cases that are not drawn; no test loses all of its own."""
    cases, others = collections.defaultdict(list), []
    for item in items:
        skipped = any(mark.args and mark.args[0] for mark in item.iter_markers("skipif"))
        if item.path.stem in ONE_IN and not skipped and not NIGHTLY:
            cases[item.path.stem, item.originalname].append(item)
    for (file, name), found in cases.items():
        count = -(-len(found) // ONE_IN[file])
        chosen = random.Random(f"{SEED} {name}").sample(found, count)
        others += [item for item in found if item not in chosen]
    return others


def drawn(cases: list, count: int) -> list:
    """Return `count` of the cases in their order, all of them at night."""
    if NIGHTLY:
        return cases
    chosen = random.Random(SEED).sample(range(len(cases)), count)
    return [cases[index] for index in sorted(chosen)]
