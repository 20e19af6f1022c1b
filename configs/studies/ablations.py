# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which parts of JTok-M matter, and what goes well beside it?

    python -m jtok_jax.study run --study=configs/studies/ablations.py --data=FOLDER --results=OTHER

One H100, one seed: a difference below the spread over seeds that arms.py:h100 shows says nothing.
Each arm changes one thing in JTok-M as arms.py:h100 starts it, with these exceptions:
even_layers_of_ten belongs beside even_layers; and jtok_with_bigram and jtok_by_bigram beside jtok,
which starts and learns as there. Where tables are not normalised (with_bigram, jtok_with_bigram),
tables take no weight decay and choose one learning rate for all of them by short runs.
"""

import dataclasses
import pathlib

from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.spec import load_study

NOT_NORMED = ("with_bigram", "jtok_with_bigram")
TABLES = "optimizer.tables"


def get_study():
    whole = load_study(f"{pathlib.Path(__file__).with_name('arms.py')}:h100")
    trial, *_, last = whole.stages
    rates = {f"{','.join(NOT_NORMED)}:{TABLES}.learning_rate_multiplier": (1.0, 3.0, 10.0)}
    return Study(
        question=__doc__.splitlines()[0],
        common=whole.common,
        arms=tuple(
            _without_decay(arm) if arm.name in NOT_NORMED else arm for arm in make_arms(whole)
        ),
        stages=(
            Stage(steps=trial.steps, vary=rates, keep=1),
            Stage(steps=last.steps, seeds=(1,)),
        ),
        baseline="jtok_m",
    )


def make_arms(whole):
    """Of a study that has JTok and JTok-M."""
    fields = {arm.name: arm.fields for arm in whole.arms}
    layers, jtok = whole.common["model.num_layers"], fields["jtok"]
    trained = {
        key: value for key, value in fields["jtok_m"].items() if not key.startswith("model.jtok.")
    }
    bigrams = lambda rows: {"model.streams": f"bigram=2:{rows}V"}

    def jtok_m(name, file="jtok_m", beside=(), **changed):
        fields = {"norm": "l2", "mixture_scale_init": 1.0} | changed
        fields = _under("model.jtok", fields) | dict(beside)
        return Arm(name, f"configs/arms/{file}.py", trained | fields)

    return (
        jtok_m("jtok_m"),
        jtok_m("balance_off", balance_weight=0.0),
        jtok_m("balance_100_times", balance_weight=1e-2),
        jtok_m("router_after_attention", router_input="post_attention"),
        jtok_m("one_of_five", top_k=1),
        jtok_m("five_of_five", top_k=5),
        jtok_m("even_layers_of_ten", layers="even", num_tables=10),
        jtok_m("even_layers", layers="even"),
        jtok_m("shared", sharing="shared"),
        jtok_m("with_bigram", "jtok_m_bigram", bigrams(layers)),
        Arm("jtok", "configs/arms/jtok.py", jtok),
        Arm("jtok_with_bigram", "configs/arms/jtok_bigram.py", jtok | bigrams(layers)),
        Arm("jtok_by_bigram", "configs/arms/bigram_gate.py", jtok | bigrams(1)),
    )


def _without_decay(arm):
    return dataclasses.replace(arm, fields={**arm.fields, f"{TABLES}.weight_decay": 0.0})


def _under(prefix, fields):
    return {f"{prefix}.{name}": value for name, value in fields.items()}
