# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.grow: a larger model that computes what it did before.

    python -m jtok_jax.grow --from=runs/small --output=runs/grown --slots=1024 --ffn_slots=4096
    python train.py --config=configs/pretrained.py:runs/grown --workdir=runs/larger ...

A TokenFormer gets more slots with keys of zero; JTok tables in more layers, with scales of zero.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.config_dict import to_dict
from jtok_jax.data import tokenizer
from jtok_jax.errors import ConfigError, exit_on_error
from jtok_jax.model.block import TABLES
from jtok_jax.model.params import Params, init_params, to_logical
from jtok_jax.model_config import ModelConfig
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.resume import CONFIG_FILE, keep_tokenizer, new_folder
from jtok_jax.training.saved import load_params

KEYS = ("zero", "random")


def grown_model(
    model: ModelConfig, slots: int = 0, ffn_slots: int = 0, jtok_layers: str = "", *, keys: str
) -> ModelConfig:
    """Return a larger model.

    Args:
        slots, ffn_slots: of each map of attention, and of the feed-forward; 0: as there are.
        jtok_layers: that have tables, see `JtokConfig.layers`; "": those that have.
        keys: "zero": the factor stays, and so does what the model computes. "random": the published
            code's way, whose factor is that of all slots.

    Raises:
        ConfigError: the model has no slots or tables, would have fewer, or as many as before.
    """
    larger = model
    if slots or ffn_slots:
        larger = _with_slots(larger, slots, ffn_slots, keys)
    if jtok_layers:
        larger = _with_tables(larger, jtok_layers)
    if larger == model:
        raise ConfigError("Nothing grows: pass --slots, --ffn_slots or --jtok_layers.")
    return larger


def _with_tables(model: ModelConfig, layers: str) -> ModelConfig:
    if model.jtok.kind == "none":
        raise ConfigError("model.jtok.kind is none: there are no tables, so init_from adds them.")
    jtok = dataclasses.replace(model.jtok, layers=layers)
    before, after = (set(one.table_layers(model.num_layers)) for one in (model.jtok, jtok))
    if before - after:
        raise ConfigError(
            f"--jtok_layers={layers} leaves out layers {sorted(before - after)}, which have tables."
        )
    return model if before == after else dataclasses.replace(model, jtok=jtok)


def _with_slots(model: ModelConfig, slots: int, ffn_slots: int, keys: str) -> ModelConfig:
    old = model.pattention
    if old.kind == "none":
        raise ConfigError("model.pattention.kind is none: there are no slots to grow.")
    if slots and old.kind == "ffn":
        raise ConfigError("--slots are those of attention, which has none: pattention.kind is ffn.")
    new, changes = {"slots": slots or old.slots, "ffn_slots": ffn_slots or old.ffn_slots}, {}
    for name, before in (("slots", old.slots_before), ("ffn_slots", old.ffn_slots_before)):
        there = getattr(old, name)
        if new[name] < there:
            raise ConfigError(
                f"--{name} is {new[name]}; the model has {there}, and none are removed."
            )
        if new[name] > there:
            history = ",".join(map(str, (*before, there))) if keys == "zero" else ""
            changes |= {name: new[name], name.replace("slots", "grown_from"): history}
    return dataclasses.replace(model, pattention=dataclasses.replace(old, **changes))


def grown_params(
    model: ModelConfig, before: ModelConfig, params: Params, *, keys: str, seed: int
) -> Params:
    """Return parameters of a grown model: those of the model before, and new ones.

    New slots come after the old ones. Where a layer gets tables its scale is zero at first.

    Args:
        params: logical, of the model before.
        seed: of new values, and of random keys, drawn as those of a new model.
    """
    drawn = init_params(model, jax.random.key(seed))
    indices = [one.jtok.table_of_layer(one.num_layers) for one in (before, model)]
    added = [layer for layer, (old, new) in enumerate(zip(*indices, strict=True)) if old < 0 <= new]
    found = {}
    for name, first in drawn.items():
        old, new = np.asarray(params[name]), np.array(first)
        if name == TABLES:
            for there, here in zip(*indices, strict=True):
                if there >= 0:
                    new[here] = old[there]
        elif name.startswith("blocks/jtok/"):
            new[added] *= not name.endswith("/scale")
            kept = np.setdiff1d(np.arange(len(new)), added)
            new[kept] = old[kept]
        else:
            count = old.shape[1] if old.ndim > 1 else 0
            if new.shape != old.shape and keys == "zero" and name.endswith("/key"):
                new[:, count:] = 0
            new[tuple(slice(size) for size in old.shape)] = old
        found[name] = new
    return found


def grow(
    run: str, output: pathlib.Path, *, slots: int = 0, ffn_slots: int = 0, jtok_layers: str = "",
    keys: str = "zero", seed: int = 0,
) -> ModelConfig:  # fmt: skip
    """Write a grown model as a run of no steps; return what it is.

    The optimizer begins anew, as the authors of TokenFormer had it.

    Args:
        run: a folder, or FOLDER@STEP. Others: see `grown_model` and `grown_params`.

    Raises:
        ConfigError: see `grown_model`.
        CheckpointError: there is no such checkpoint.
        WorkdirError: `output` holds something, or cannot be written.
    """
    path, _, step = run.partition("@")
    saved = load_params(pathlib.Path(path), step=step or "newest")
    before = saved.config.model
    model = grown_model(before, slots, ffn_slots, jtok_layers, keys=keys)
    params = grown_params(model, before, to_logical(saved.params), keys=keys, seed=seed)
    with new_folder(output) as folder:
        config = Config(model=model, train=saved.config.train)
        (folder / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=1) + "\n")
        keep_tokenizer(folder, saved.workdir / tokenizer.FILE_NAME)
        words = {name: one for name, one in saved.data.items() if name == "tokenizer"}
        checkpoints = Checkpoints(folder, config, data=words, end_id=saved.end_id)
        checkpoints.save_params(params)
        checkpoints.close()
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.grow", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--from", dest="run", required=True, help="folder of a run, or FOLDER@STEP")
    option("--output", required=True, type=pathlib.Path, help="folder to write")
    option("--slots", type=int, default=0, help="of each map of attention (as many as there are)")
    option("--ffn_slots", type=int, default=0, help="of the feed-forward (as many as there are)")
    option("--jtok_layers", default="", help="layers with tables, as all or 0,2 (as there are)")
    option("--keys", choices=KEYS, default="zero", help="new ones; random: as the published code")
    option("--seed", type=int, default=0, help="of new values (0)")
    options = vars(parser.parse_args(arguments))
    with exit_on_error():
        found = grow(**options)
        size = flops.count(found, seq_len=1)
        print(f"{options['output']}: {size.backbone:,} parameters and {size.tables:,} of tables")
        print(f"train it: --config=configs/pretrained.py:{options['output']}")


if __name__ == "__main__":
    main()
