# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Do tables learn as well when only the rows of a step are updated?

    python -m jtok_jax.study run --study=configs/studies/tables.py --data=FOLDER

A bigram table, value embeddings and DeepEmbed under three optimizers of their rows: `adamw`, whose
gradients and moments are dense, `lazy_adam` and `rowwise_adam`. Learning rates are those that were
found for `adamw`. One seed, 400 steps, nine runs of up to four minutes on two CPU cores.
"""

import pathlib

from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.spec import load_study

MULTIPLIERS = {"bigram": 1.0, "value_embedding": 3.0, "deep_embed": 1.0}
KINDS = ("adamw", "lazy_adam", "rowwise_adam")


def get_study():
    whole = load_study(str(pathlib.Path(__file__).with_name("arms.py")))
    fields = {arm.name: arm.fields for arm in whole.arms}["bigram"] | {"model.init_std": 0.088}
    shared = {key: value for key, value in fields.items() if key != "model.streams"}
    arms = []
    for name, multiplier in MULTIPLIERS.items():
        rate = {"optimizer.tables.learning_rate_multiplier": multiplier}
        own = fields if name == "bigram" else shared
        arms.append(Arm(name, f"configs/arms/{name}.py", own | rate))
    return Study(
        question=__doc__.splitlines()[0],
        common=whole.common,
        arms=tuple(arms),
        stages=(Stage(steps=400, seeds=(1,), vary={"optimizer.tables.kind": KINDS}),),
        baseline="bigram",
    )
