# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""How much of what tables win does a larger embedding win as well?

    python -m jtok_jax.study run --study=configs/studies/embedding.py --data=FOLDER

dense, JTok and JTok-M as configs/studies/parameterisation.py chose them, whose runs are shared, and
the same with the embedding alone starting at a standard deviation of 1: `model.init_std`, which
those trials varied, is of all matrices at once. One seed, 200 steps, on two CPU cores.
"""

import pathlib

from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.spec import load_study

EMBED = "model.embed_init_std"


def get_study():
    whole = load_study(str(pathlib.Path(__file__).with_name("arms.py")))
    arms = [arm for arm in whole.arms if arm.name in ("dense", "jtok", "jtok_m")]
    larger = [Arm(f"{arm.name}_embed_1", arm.config, arm.fields | {EMBED: 1.0}) for arm in arms]
    return Study(
        question=__doc__.splitlines()[0],
        common=whole.common,
        arms=(*arms, *larger),
        stages=(Stage(steps=200),),
    )
