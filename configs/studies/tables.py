# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What do tables at the input and in layers buy together, and do they need dense updates?

    python -m jtok_jax.study run --study=configs/studies/tables.py:together --data=FOLDER
    python -m jtok_jax.study run --study=configs/studies/tables.py:rows --data=FOLDER

together: JTok and JTok-M with a bigram table beside that table alone, and beside one with as many
parameters as JTok and it have together. Each starts as arms.py chose it alone. Short runs on
another seed choose the initial values and the rate of the bigram table. Three seeds, 400 steps.

rows: a bigram table, value embeddings and DeepEmbed under three optimizers of their rows: `adamw`,
whose gradients and moments are dense, `lazy_adam` and `rowwise_adam`. Rates are those found for
`adamw`. One seed, 400 steps.

All runs take up to four minutes on two CPU cores.
"""

import pathlib

from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.spec import load_study

MULTIPLIER, STD = "optimizer.tables.learning_rate_multiplier", "model.init_std"
OVERRIDES = "optimizer.tables.overrides"
KINDS = ("adamw", "lazy_adam", "rowwise_adam")


def get_study(part="together"):
    whole = load_study(str(pathlib.Path(__file__).with_name("arms.py")))
    alone = {arm.name: arm for arm in whole.arms}
    bigram = alone["bigram"].fields | {STD: 0.088, MULTIPLIER: 1.0}
    arms, stages = {"together": together, "rows": rows}[part](alone, bigram)
    return Study(
        question=__doc__.splitlines()[0],
        common=whole.common,
        arms=tuple(arms),
        stages=tuple(stages),
        baseline="bigram",
    )


def together(alone, bigram):
    streams, rate = {"model.streams": bigram["model.streams"]}, "ngram.learning_rate_multiplier"
    arms = [Arm("bigram", "configs/arms/bigram.py", bigram, tried=6)]
    double = bigram | {"model.streams": "bigram=2:8V"}  # as many parameters as with JTok
    arms.append(Arm("bigram_double", "configs/arms/bigram.py", double, tried=6))
    for name in ("jtok", "jtok_m"):
        file, fields = f"configs/arms/{name}_bigram.py", alone[name].fields | streams
        fields |= {OVERRIDES: f"{rate}=1"}
        arms.append(Arm(f"{name}_bigram", file, fields, tried=alone[name].tried))
    both = "jtok_bigram,jtok_m_bigram"
    return arms, (
        Stage(steps=200, vary={f"{both}:{STD}": (0.02, 0.088)}, keep=1),
        Stage(steps=200, vary={f"{both}:{OVERRIDES}": (f"{rate}=1", f"{rate}=3")}, keep=1),
        Stage(steps=400, seeds=(1, 2, 3)),
    )


def rows(alone, bigram):
    shared = {key: value for key, value in bigram.items() if key != "model.streams"}
    others = {"value_embedding": 3.0, "deep_embed": 1.0}
    arms = [Arm("bigram", "configs/arms/bigram.py", bigram)]
    for name, multiplier in others.items():
        arms.append(Arm(name, f"configs/arms/{name}.py", shared | {MULTIPLIER: multiplier}))
    return arms, (Stage(steps=400, seeds=(1,), vary={"optimizer.tables.kind": KINDS}),)
