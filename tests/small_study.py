# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A study of two arms of one small layer, and tables of its results without training."""

import pathlib

from conftest import ROOT

from jtok_jax.study import Arm, Stage, Study
from jtok_jax.study.results import Table, make_result
from jtok_jax.study.spec import Candidate, cells, expand, resolve
from jtok_jax.study.trainer import Paths

RATE = "optimizer.tables.learning_rate_multiplier"
COMMON = {
    "model.vocab_size": 64, "model.model_dim": 16, "model.num_layers": 1, "model.num_heads": 2,
    "model.num_kv_heads": 2, "model.compute_dtype": "float32", "train.batch_size": 4,
    "train.seq_len": 16, "data.source": "synthetic", "evaluation.batch_size": 4,
    "checkpoint.every": 20,
}  # fmt: skip
WHERE = {"device": "1 x cpu", "data": "x", "commit": "c", "jax": "0.0"}
ARMS = (Arm("dense", "configs/arms/dense.py"), Arm("bigram", "configs/arms/bigram.py"))
STUDY = Study("Does it?", COMMON, ARMS, (Stage(steps=600, seeds=(0, 1)),))
FILE = f"""
from jtok_jax.study import Arm, Stage, Study

def get_study():
    return {STUDY!r}
"""


def candidates_of(study: Study, stage: Stage) -> list[Candidate]:
    """What a first stage trains."""
    return [one for arm in study.arms for one in expand([Candidate(arm)], stage)]


def first_cells(study: Study):
    return cells(study, study.stages[0], candidates_of(study, study.stages[0]))


def fill(folder: pathlib.Path, wanted, losses) -> Paths:
    """Lines of the table for runs that ended at losses(cell); None: not finite."""
    table = Table(folder)
    for cell in wanted:
        loss, config = losses(cell), resolve(cell, ROOT)
        records = [{"step": s, "loss": loss, "step_seconds": 0.5} for s in range(1, cell.steps + 1)]
        if loss is not None:
            records[-1] |= {"val_loss": loss, "val_bpb": loss / 3}
        result, curve = make_result(cell, config, records, **WHERE)
        table.add(result, config, curve)
    return Paths(ROOT, folder / "runs", folder)


def filled(folder: pathlib.Path, losses: dict[str, float]) -> Paths:
    """All runs of STUDY at the loss of their arm, plus a tenth a seed."""
    return fill(folder, first_cells(STUDY), lambda c: losses[c.candidate.arm.name] + c.seed / 10)


def finished_at(cell, **changes):
    """What `Table.add` takes of a run that ended at a loss of 1."""
    config = resolve(cell, ROOT)
    record = {"step": config.train.steps, "loss": 1.0, "step_seconds": 1.0}
    about = {"device": "1 x cpu", "data": "", "commit": "", "jax": ""} | changes
    result, curve = make_result(cell, config, [record | {"val_loss": 1.0, "val_bpb": 1.0}], **about)
    return result, config, curve
