# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.grow: a TokenFormer with more slots, which computes what it did before.

    python -m jtok_jax.grow --from=runs/small --output=runs/grown --slots=1024 --ffn_slots=4096
    python train.py --config=configs/pretrained.py:runs/grown --workdir=runs/larger ...

New keys are zero, so logits stay the same to the last bit in float32 (docs/tokenformer.md).
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np

from jtok_jax.config import Config
from jtok_jax.config_dict import to_dict
from jtok_jax.data import tokenizer
from jtok_jax.errors import ConfigError, exit_on_error
from jtok_jax.model.params import Params, init_params, to_logical
from jtok_jax.model_config import ModelConfig, PattentionConfig
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.resume import CONFIG_FILE, keep_tokenizer, new_folder
from jtok_jax.training.saved import load_params

KEYS = ("zero", "random")


def grown_model(model: ModelConfig, slots: int, ffn_slots: int, *, keys: str) -> ModelConfig:
    """Return a model with more slots.

    Args:
        slots, ffn_slots: of each map of attention, and of the feed-forward; 0: as there are.
        keys: "zero": the factor stays, and so does what the model computes. "random": the published
            code's way, whose factor is that of all slots.

    Raises:
        ConfigError: the model has no slots, would have fewer, or as many as before.
    """
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
    if not changes:
        raise ConfigError("Nothing grows: pass --slots or --ffn_slots above those of the model.")
    return dataclasses.replace(model, pattention=dataclasses.replace(old, **changes))


def grown_params(model: ModelConfig, params: Params, *, keys: str, seed: int) -> Params:
    """Return parameters of a grown model: the old slots first, then new ones.

    Args:
        params: logical, of the model before.
        seed: of new values, and of random keys, drawn as those of a new model.
    """
    drawn = init_params(model, jax.random.key(seed))
    found = {}
    for name, new in drawn.items():
        old = np.asarray(params[name])
        if new.shape != old.shape:
            more = np.asarray(new)[:, old.shape[1] :].astype(old.dtype)
            if keys == "zero" and name.endswith("/key"):
                more = np.zeros_like(more)
            old = np.concatenate([old, more], axis=1)
        found[name] = old
    return found


def grow(
    run: str, output: pathlib.Path, *, slots: int = 0, ffn_slots: int = 0, keys: str = "zero",
    seed: int = 0,
) -> PattentionConfig:  # fmt: skip
    """Write a grown model as a run of no steps; return what its slots are.

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
    model = grown_model(saved.config.model, slots, ffn_slots, keys=keys)
    params = grown_params(model, to_logical(saved.params), keys=keys, seed=seed)
    with new_folder(output) as folder:
        config = Config(model=model, train=saved.config.train)
        (folder / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=1) + "\n")
        keep_tokenizer(folder, saved.workdir / tokenizer.FILE_NAME)
        words = {name: one for name, one in saved.data.items() if name == "tokenizer"}
        checkpoints = Checkpoints(folder, config, data=words, end_id=saved.end_id)
        checkpoints.save_params(params)
        checkpoints.close()
    return model.pattention


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.grow", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--from", dest="run", required=True, help="folder of a run, or FOLDER@STEP")
    option("--output", required=True, type=pathlib.Path, help="folder to write")
    option("--slots", type=int, default=0, help="of each map of attention (as many as there are)")
    option("--ffn_slots", type=int, default=0, help="of the feed-forward (as many as there are)")
    option("--keys", choices=KEYS, default="zero", help="new ones; random: as the published code")
    option("--seed", type=int, default=0, help="of new values (0)")
    options = vars(parser.parse_args(arguments))
    with exit_on_error():
        found = grow(**options)
        grown = {name: value for name, value in dataclasses.asdict(found).items() if value}
        print(f"{options['output']}: {', '.join(f'{name} {one}' for name, one in grown.items())}")
        print(f"train it: --config=configs/pretrained.py:{options['output']}")


if __name__ == "__main__":
    main()
