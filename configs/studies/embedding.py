# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""How much of what tables win does a larger embedding win as well?

    python -m jtok_jax.study run --study=configs/studies/embedding.py --data=FOLDER
    python -m jtok_jax.study run --study=configs/studies/embedding.py:full --data=FOLDER

dense, JTok and JTok-M as configs/studies/parameterisation.py chose them, whose runs are shared, and
the same with the embedding alone starting larger: `model.init_std`, which those trials varied, is
of all matrices at once. One seed, 200 steps, on two CPU cores; `full`: 400 steps and three seeds of
the one that won there, which does not win there: three runs more than parameterisation.py has.
"""

import pathlib

from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.spec import load_study

EMBED, STD = "model.embed_init_std", "model.init_std"
LARGER = {
    "dense": ({EMBED: 1.0}, {EMBED: 0.3}),
    "jtok": ({EMBED: 1.0},),
    "jtok_m": ({EMBED: 1.0}, {EMBED: 1.0, STD: 0.088}),
}
STAGES = {"trial": Stage(steps=200), "full": Stage(steps=400, seeds=(1, 2, 3))}
WON = ("dense_embed_1.0",)  # over the same with a small embedding, at 200 steps


def get_study(length="trial"):
    whole = load_study(str(pathlib.Path(__file__).with_name("arms.py")))
    arms = [arm for arm in whole.arms if arm.name in LARGER]
    for arm in tuple(arms):
        for fields in LARGER[arm.name]:
            name = "_".join([arm.name, "embed", *map(str, fields.values())])
            if length == "trial" or name in WON:
                before = arm.tried + (len(LARGER[arm.name]) if length == "full" else 0)
                arms.append(Arm(name, arm.config, arm.fields | fields, tried=before))
    return Study(
        question=__doc__.splitlines()[0],
        common=whole.common,
        arms=tuple(arms),
        stages=(STAGES[length],),
    )
