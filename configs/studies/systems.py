# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok, JTok-M, SCONE, TokenFormer: what does each buy at equal FLOPs?

    python -m jtok_jax.scone build --data=FOLDER --rows=65536 --output=FILE
    study="--study=configs/studies/systems.py --results=docs/results/systems"
    python -m jtok_jax.study run $study --data=FOLDER --ngrams=FILE

All in one decoder, on the same batches, on two CPU cores. All arms but wider_dense decode with the
FLOPs of dense, JTok's and JTok-M's gates apart. SCONE trains with more: wider_dense has as many in
training. Tables have about as many parameters as JTok-M's, JTok's a fifth.

Every arm chooses among two rates by short runs on a seed of its own, dense and TokenFormer among
three; TokenFormer among two initial values at each; tables that nothing normalises their own rate
afterwards. SCONE's initial values were chosen from five before. `seeds`: five arms under three
seeds, the first that of all.
"""

from jtok_jax.study import Arm, Stage, Study

RATE, STD = "optimizer.learning_rate", "model.init_std"
MULTIPLIER = "optimizer.tables.learning_rate_multiplier"
FIVE = ("dense", "scone", "ngram_table", "jtok_m", "tokenformer")
DIM = 128
TABLES = {
    "optimizer.tables.kind": "lazy_adam", "optimizer.tables.b1": 0.9, "optimizer.tables.b2": 0.95,
    "optimizer.tables.weight_decay": 0.0,
}  # fmt: skip
NORMED = TABLES | {MULTIPLIER: 10.0, STD: 0.02, "model.jtok.norm": "l2"}
DENSE = {STD: DIM**-0.5}
FIELDS = {
    "dense": DENSE,
    "wider_dense": DENSE | {"model.ffn_dim": 672},
    "scone": DENSE
    | {
        "model.arms.scone.num_layers": 2,
        "model.arms.scone.room": 1.25,
        "model.arms.scone.output_init": 1.0,
        "model.arms.scone.zero_init": True,
    },
    "ngram_table": DENSE | TABLES,
    "bigram": DENSE | TABLES | {"model.streams": "bigram=2:65536"},
    "jtok": NORMED | {"model.jtok.gate_scale_init": DIM**0.5},
    "jtok_m": NORMED | {"model.jtok.mixture_scale_init": 1.0},
    "tokenformer": {},
    "tokenformer_ffn": {},
}


def get_study(part="all"):
    chosen = FIELDS if part == "all" else FIVE
    arms = tuple(
        Arm(
            name,
            f"configs/arms/{name.removeprefix('wider_')}.py",
            FIELDS[name],
            tried=5 if name == "scone" else 0,
        )
        for name in chosen
    )
    among = lambda *arms: ",".join(name for name in arms if name in chosen) + ":"
    varied = (
        {
            RATE: (3e-3, 6e-3),
            among("dense", "tokenformer") + RATE: (3e-3, 6e-3, 1.2e-2),
            among("tokenformer", "tokenformer_ffn") + STD: (0.02, DIM**-0.5),
        },
        {among("ngram_table", "bigram") + MULTIPLIER: (1.0, 10.0)},
    )
    return Study(
        question=__doc__.splitlines()[0],
        common={
            "model.compute_dtype": "float32", "model.model_dim": DIM, "model.num_layers": 4,
            "model.vocab_size": 4096, "train.batch_size": 16, "train.seq_len": 256,
            "evaluation.batch_size": 16, "evaluation.max_sequences": 512,
            "evaluation.every": 10_000, "checkpoint.every": 100, "checkpoint.keep": 1,
        },
        arms=arms,
        stages=(
            *(Stage(steps=150, vary=vary, keep=1) for vary in varied),
            Stage(steps=400, seeds=(1,) if part == "all" else (1, 2, 3)),
        ),
    )  # fmt: skip
