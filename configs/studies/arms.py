# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What does a table by token buy, beside what else one could add?

    python -m jtok_jax.study run --study=configs/studies/arms.py --data=FOLDER
    python -m jtok_jax.study run --study=configs/studies/arms.py:h100 --data=FOLDER --results=OTHER

All in one decoder, on the same batches.

On two CPU cores, runs of 1 to 4 minutes, two seeds: JTok and JTok-M beside a bigram table of JTok's
size. dense, JTok and JTok-M start as configs/studies/parameterisation.py found best, and share its
runs. These two table models were chosen among two at full length on the very seeds that are shown,
bigram by short runs on another seed alone, with the tables' weight decay found for JTok-M.

On one H100, all arms, three seeds, bfloat16, 8,192 entries, so that a table by token outweighs the
backbone, 52M tokens (at most 4 passes over the corpus of docs/study.md): every arm chooses its
learning rates and initial values alike, on a seed of its own; weight decay on tables only where
rows are normalised, so that it takes nothing from them. wider_dense is to have the step time of
JTok-M (`study time` tells; until then its width is a guess), experts have its number of parameters,
and so has the larger of two bigram tables.
"""

from jtok_jax.study import Arm, Stage, Study

MULTIPLIER, RATE = "optimizer.tables.learning_rate_multiplier", "optimizer.learning_rate"
STD, EMBED = "model.init_std", "model.embed_init_std"

COMMON = {
    "cpu": {
        "model.compute_dtype": "float32", "model.model_dim": 128, "model.num_layers": 4,
        "model.vocab_size": 4096, "train.batch_size": 16, "evaluation.batch_size": 16,
        "checkpoint.every": 150,
    },
    "h100": {
        "model.compute_dtype": "bfloat16", "model.model_dim": 384, "model.num_layers": 8,
        "model.ffn_dim": 1024, "model.num_heads": 6, "model.num_kv_heads": 6,
        "model.vocab_size": 8192, "train.batch_size": 128, "evaluation.batch_size": 64,
        "checkpoint.every": 10_000,
    },
}  # fmt: skip
STEPS = {"cpu": (200, 400), "h100": (400, 1600)}  # of a trial, of a run
SEEDS = {"cpu": (1, 2), "h100": (1, 2, 3)}
ON_CPU = ("dense", "jtok", "jtok_m", "bigram")
WIDER = 1280  # feed-forward of a dense model with the step time of JTok-M on an H100


def get_study(device="cpu"):
    common, (trial, steps) = COMMON[device], STEPS[device]
    arms = make_arms(device, common)
    names = [arm.name for arm in arms]
    choose = choose_on_cpu if device == "cpu" else choose_on_h100
    return Study(
        question=__doc__.splitlines()[0],
        common=common | {
            "train.seq_len": 256, "checkpoint.keep": 1, "evaluation.every": 10_000,
        },
        arms=arms,
        stages=(
            *(Stage(steps=trial, vary=vary, keep=1) for vary in choose(names, common)),
            Stage(steps=steps, seeds=SEEDS[device]),
        ),
    )  # fmt: skip


def make_arms(device, common):
    """Every arm as it starts."""
    tried = {"dense": 5, "jtok": 19, "jtok_m": 19}
    dim, layers = common["model.model_dim"], common["model.num_layers"]
    ffn = common.get("model.ffn_dim", 344)
    normed = {
        "optimizer.tables.b1": 0.9, "optimizer.tables.b2": 0.95,
        "optimizer.tables.weight_decay": 0.1, MULTIPLIER: 10.0,
    }  # fmt: skip
    # On the CPU as those runs were made; the rate is chosen.
    tables = normed
    if device == "h100":
        tables = normed | {"optimizer.tables.weight_decay": 0.0, MULTIPLIER: 1.0}
    rate = {RATE: 6e-3}
    jtok = normed | {STD: 0.02, RATE: 3e-3, "model.jtok.norm": "l2"}
    jtok["model.jtok.gate_scale_init"] = dim**0.5
    jtok_m = normed | rate | {STD: 0.02, "model.jtok.norm": "l2"}
    jtok_m["model.jtok.mixture_scale_init"] = 1.0
    dense = rate | {STD: 0.088 if device == "cpu" else dim**-0.5}
    wider = dense | {"model.ffn_dim": WIDER}
    expert = 3 * dim * (ffn // 2)
    # In a layer: the parameters of the two that a token uses, and of five tables.
    experts = round((2 * expert + 5 * common["model.vocab_size"] * dim) / expert)
    moe = {"num_experts": experts, "top_k": 2, "expert_dim": ffn // 2}
    moe = rate | {f"model.moe.{key}": value for key, value in moe.items()}
    bigram = tables | rate
    rows = lambda count: {"model.streams": f"bigram=2:{count}V"}  # as many rows as ids times that
    low_rank = {"norm": "l2", "scale_init": dim**0.5}
    low_rank = normed | rate | {f"model.arms.low_rank.{key}": v for key, v in low_rank.items()}
    fields = {
        "dense": dense, "wider_dense": wider, "jtok": jtok, "jtok_m": jtok_m,
        "bigram": bigram | rows(layers), "moe": moe,
    }  # fmt: skip
    if device == "cpu":
        fields = {name: fields[name] for name in ON_CPU}
    else:
        fields |= {
            "bigram_large": bigram | rows(5 * layers), "value_embedding": tables | rate,
            "deep_embed": tables | rate, "film": rate, "adapter": rate, "low_rank": low_rank,
        }  # fmt: skip
    file = lambda name: f"configs/arms/{name.removeprefix('wider_').removesuffix('_large')}.py"
    return tuple(Arm(name, file(name), of, tried=tried.get(name, 0)) for name, of in fields.items())


def choose_on_cpu(names, common):
    """Initial values, then a rate, of what has no study of its own."""
    return (
        {f"bigram:{STD}": (0.02, 0.088)},
        {f"bigram:{MULTIPLIER}": (0.1, 0.3, 1.0, 3.0, 10.0)},
    )


def choose_on_h100(names, common):
    """The learning rate, that of the tables over it, then initial values, of every arm."""
    of = lambda *some: ",".join(name for name in names if name in some)
    normed = of("jtok", "jtok_m", "low_rank")
    others = of("bigram", "bigram_large", "value_embedding", "deep_embed")
    return (
        {RATE: (1.5e-3, 3e-3, 6e-3)},
        {
            f"{normed}:{MULTIPLIER}": (3.0, 10.0, 30.0),
            f"{others}:{MULTIPLIER}": (0.3, 1.0, 3.0, 10.0),
        },
        {STD: (0.02, common["model.model_dim"] ** -0.5), EMBED: (0.0, 1.0)},
    )
