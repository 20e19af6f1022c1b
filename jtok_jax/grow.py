# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.grow: a larger model that computes what it did before.

    python -m jtok_jax.grow --from=runs/small --output=runs/grown --slots=1024 --ffn_slots=4096
    python train.py --config=configs/pretrained.py:runs/grown --workdir=runs/larger ...

A TokenFormer gets more slots with keys of zero; JTok tables in more layers, with scales of zero;
JTok-M more tables, of zeros, that it reads beside those it chose; any model more tokens.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.config_dict import flatten, to_dict
from jtok_jax.data import tokenizer
from jtok_jax.data.manifest import file_sha256
from jtok_jax.errors import ConfigError, exit_on_error
from jtok_jax.model.block import TABLES
from jtok_jax.model.ngram_index import indices_of, names_of, with_more_tokens
from jtok_jax.model.params import (
    Declared,
    Params,
    abstract_params,
    declared,
    init_params,
    to_logical,
)
from jtok_jax.model_config import ModelConfig
from jtok_jax.store.rows import require_trainable
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.moments import Moments, moments_of, with_moments
from jtok_jax.training.optimizer import Optimizer, count_shape, make_optimizer
from jtok_jax.training.resume import CONFIG_FILE, keep_tokenizer, new_folder
from jtok_jax.training.saved import load_params
from jtok_jax.training.state import TrainState

KEYS = ("zero", "random")
READ = 8.0  # logit of a new table: above those of old ones


@dataclasses.dataclass(frozen=True)
class Growth:
    """Says what a model gets more of; 0 and "" leave it as it is.

    slots, ffn_slots: of each map of attention, and of the feed-forward.
    jtok_layers: that have tables, see `JtokConfig.layers`.
    jtok_tables: of JTok-M in a layer.
    vocab_size: tokens.
    keys: "zero": the factor stays, and so does what the model computes. "random": the published
        code's way, whose factor is that of all slots.
    """

    slots: int = 0
    ffn_slots: int = 0
    jtok_layers: str = ""
    jtok_tables: int = 0
    vocab_size: int = 0
    keys: str = "zero"


def grown_model(model: ModelConfig, growth: Growth) -> ModelConfig:
    """Return a larger model.

    Raises:
        ConfigError: it lacks what grows, would have less of it, or as much as before.
    """
    larger = model
    if growth.slots or growth.ffn_slots:
        larger = _with_slots(larger, growth)
    if growth.jtok_layers:
        larger = _with_table_layers(larger, growth.jtok_layers)
    if growth.jtok_tables:
        larger = _with_more_tables(larger, growth.jtok_tables)
    if growth.vocab_size:
        larger = _with_more_tokens(larger, growth.vocab_size)
    if larger == model:
        raise ConfigError(
            "Nothing grows: pass --slots, --ffn_slots, --jtok_layers, --jtok_tables or "
            "--vocab_size, above what the model has."
        )
    return larger


def _with_more_tables(model: ModelConfig, tables: int) -> ModelConfig:
    """Return JTok-M that reads its new tables beside those it chose before."""
    old = model.jtok
    if old.kind != "jtok_m":
        raise ConfigError(f"model.jtok.kind is {old.kind}: --jtok_tables is of JTok-M.")
    _require_no_less("jtok_tables", tables, old.num_tables)
    top_k = old.top_k + tables - old.num_tables
    jtok = dataclasses.replace(old, num_tables=tables, top_k=top_k, router_bias=True)
    return model if tables == old.num_tables else dataclasses.replace(model, jtok=jtok)


def _with_more_tokens(model: ModelConfig, tokens: int) -> ModelConfig:
    """Return a model with more tokens, whose hashed n-grams stay where they are."""
    _require_no_less("vocab_size", tokens, model.vocab_size)
    rows = lambda found: f":{int(found[1]) * model.padded_vocab}"
    return dataclasses.replace(
        model, vocab_size=tokens, streams=re.sub(r":(\d+)V", rows, model.streams)
    )


def _require_no_less(name: str, wanted: int, there: int) -> None:
    if wanted < there:
        raise ConfigError(f"--{name} is {wanted}; the model has {there}, and none are removed.")


def _with_table_layers(model: ModelConfig, layers: str) -> ModelConfig:
    if model.jtok.kind == "none":
        raise ConfigError("model.jtok.kind is none: there are no tables, so init_from adds them.")
    jtok = dataclasses.replace(model.jtok, layers=layers)
    before, after = (set(one.table_layers(model.num_layers)) for one in (model.jtok, jtok))
    if before - after:
        raise ConfigError(
            f"--jtok_layers={layers} leaves out layers {sorted(before - after)}, which have tables."
        )
    return model if before == after else dataclasses.replace(model, jtok=jtok)


def _with_slots(model: ModelConfig, growth: Growth) -> ModelConfig:
    old, slots, ffn_slots = model.pattention, growth.slots, growth.ffn_slots
    if old.kind == "none":
        raise ConfigError("model.pattention.kind is none: there are no slots to grow.")
    if slots and old.kind == "ffn":
        raise ConfigError("--slots are those of attention, which has none: pattention.kind is ffn.")
    new, changes = {"slots": slots or old.slots, "ffn_slots": ffn_slots or old.ffn_slots}, {}
    for name, before in (("slots", old.slots_before), ("ffn_slots", old.ffn_slots_before)):
        there = getattr(old, name)
        _require_no_less(name, new[name], there)
        if new[name] > there:
            history = ",".join(map(str, (*before, there))) if growth.keys == "zero" else ""
            changes |= {name: new[name], name.replace("slots", "grown_from"): history}
    return dataclasses.replace(model, pattention=dataclasses.replace(old, **changes))


def grown_params(
    model: ModelConfig, before: ModelConfig, params: Params, *, keys: str = "zero", seed: int
) -> Params:
    """Return parameters of a grown model: those of the model before, and new ones.

    What is new comes after the old. Where a layer gets tables its scale is zero at first. New
    tables of JTok-M are zeros, and always read.

    Args:
        params: logical, of the model before.
        keys: of new slots, see `Growth`.
        seed: of new values, and of random keys, drawn as those of a new model.

    Raises:
        ConfigError: where slots grow, old ones have keys and values of zero.
    """
    drawn, told, found = init_params(model, jax.random.key(seed)), declared(model), {}
    for name, first in drawn.items():
        found[name] = np.array(first)
        if name in params:
            _carry(name, np.asarray(params[name]), found[name], before, model)
        if name == TABLES or name.startswith("blocks/jtok/"):
            _begin_jtok(name, found[name], before, model, is_new=name not in params)
        elif name.endswith("/key") and "S" in told[name].axes:
            if (slots := params[name].shape[1]) < first.shape[1]:
                _require_gradients(name, params)
            if keys == "zero":
                found[name][:, slots:] = 0
    for name, stream in model.frequent_streams.items():
        index = indices_of(params)[name]
        moved = with_more_tokens(index, before.frequent_streams[name], stream)
        found |= zip(names_of(name), moved, strict=True)
    return found


def _require_gradients(name: str, params: Params) -> None:
    """Raise ConfigError if old slots would never learn, of the map whose keys are `name`."""
    of_map = name.removesuffix("/key")
    some = [np.any(params[one], axis=-1) for one in (name, f"{of_map}/value")]
    if dead := int(np.sum(~np.logical_or(*some))):
        raise ConfigError(
            f"{dead} slots of {of_map} have keys and values of zero, so no gradient reaches them. "
            "Grow from a step where they had some, as --from=RUN@STEP, or write random numbers "
            "into their values: that changes no logit."
        )


def grown_moments(
    model: ModelConfig, before: ModelConfig, moments: Moments, optimizer: Optimizer
) -> TrainState:
    """Return a state without parameters, at step 0: the moments of before, and zeros for the new.

    What is new counts its steps from 0.

    Args:
        optimizer: of the grown model, of `init_moments`.
    """

    def grown(name: str, leaf: str, like: jax.ShapeDtypeStruct, value: jax.Array | None):
        new = np.zeros(like.shape, like.dtype)
        if value is None:
            return new
        value = np.asarray(value)
        if leaf == "count":
            value = np.broadcast_to(value, count_shape(declared(before)[name]))
        if not value.ndim:
            return value
        if leaf == "decayed":  # new rows have nothing to catch up with
            new[...] = moments[name]["log_decay"]
        _carry(name, value, new, before, model)
        return new

    masters = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.float32)
        for name, leaf in abstract_params(model).items()
    }
    opt_state = with_moments(jax.eval_shape(optimizer.init, masters), moments, grown)
    return TrainState(np.int32(0), {}, opt_state, np.int32(0), np.int32(0))


def _carry(
    name: str, old: np.ndarray, new: np.ndarray, before: ModelConfig, model: ModelConfig
) -> None:
    """Write a parameter, or a leaf of its moments, into the first entries of a grown one.

    JTok's are of some layers; the parameters of a layer that had no tables are not written.
    """
    told, pairs = declared(before)[name], [(..., ...)]
    layers = [one.jtok.table_of_layer(one.num_layers) for one in (before, model)]
    if name == TABLES:
        pairs = [pair for pair in zip(*layers, strict=True) if pair[0] >= 0]
    elif name.startswith("blocks/jtok/"):
        pairs = [(layer, layer) for layer, table in enumerate(layers[0]) if table >= 0]
    old = old[_tokens_of(told, before)[: old.ndim]]
    for there, here in pairs:
        part = old[there]
        new[here][tuple(slice(size) for size in part.shape)] = part


def _tokens_of(one: Declared, model: ModelConfig) -> tuple[slice, ...]:
    """Return where a parameter has no padding of the vocabulary."""
    found = [slice(model.vocab_size if letter == "V" else None) for letter in one.axes]
    if one.is_table and one.stream == "token":
        found[-2] = slice(model.vocab_size)
    return tuple(found)


def _begin_jtok(
    name: str, new: np.ndarray, before: ModelConfig, model: ModelConfig, *, is_new: bool
) -> None:
    """Write what tables begin with: a scale of zero, or zeros that are read beside the old ones.

    is_new: the model before had no such parameter.
    """
    what, tables = name.rpartition("/")[2], before.jtok.num_tables
    layers = [one.jtok.table_of_layer(one.num_layers) for one in (before, model)]
    for layer, (there, here) in enumerate(zip(*layers, strict=True)):
        if there < 0 <= here and what == "scale":
            new[layer] = 0
        if there < 0:
            continue
        if name == TABLES and new.ndim > 3:
            new[here, tables:] = 0
        if what == "router":
            new[layer, :, tables:] = 0
        if what == "router_bias":
            new[layer, tables:] = READ
            if is_new:
                new[layer, :tables] = 0


def grow(
    run: str, output: pathlib.Path, growth: Growth, *, words: pathlib.Path | None = None,
    seed: int = 0, moments: bool = False,
) -> Config:  # fmt: skip
    """Write a grown model as a run of no steps; return its configuration.

    The optimizer begins anew, as the authors of TokenFormer had it, unless its moments are kept.

    Args:
        run: a folder, or FOLDER@STEP.
        words: tokenizer.json of the grown model; None: that of the run.
        seed: see `grown_params`.
        moments: keep those of the optimizer, for a run of `init_moments`.

    Raises:
        ConfigError: see `grown_model`; or `words` has other tokens than the run's in their place;
            or the run trained tables by adamw, whose moments are not kept.
        DataError: `words` is no tokenizer.
        CheckpointError: there is no such checkpoint.
        WorkdirError: `output` holds something, or cannot be written.
    """
    path, _, step = run.partition("@")
    saved = load_params(pathlib.Path(path), step=step or "newest", moments=moments)
    before = saved.config.model
    model = grown_model(before, growth)
    if words:
        _require_old_tokens(words, saved.workdir / tokenizer.FILE_NAME, model.vocab_size)
    config, state = Config(model=model, train=saved.config.train), None
    if moments:  # init_moments: it is read as the state of a run that began with some
        config = dataclasses.replace(
            config, optimizer=saved.config.optimizer, init_from=run, init_moments=True
        )
        require_trainable(config)
        state = grown_moments(model, before, moments_of(saved.state), make_optimizer(config))
    params = grown_params(model, before, to_logical(saved.params), keys=growth.keys, seed=seed)
    with new_folder(output) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=1) + "\n")
        data = {name: one for name, one in saved.data.items() if name == "tokenizer"}
        keep_tokenizer(folder, saved.workdir / tokenizer.FILE_NAME)
        if words:
            shutil.copyfile(words, folder / tokenizer.FILE_NAME)
            data = {"tokenizer": file_sha256(words)}
        checkpoints = Checkpoints(folder, config, data=data, end_id=saved.end_id)
        checkpoints.save_params(params, state)
        checkpoints.close()
    return config


def _options(config: Config) -> str:
    """Return the options of train.py that moments were gathered with, but for defaults."""
    values, usual = (flatten(to_dict(one)) for one in (config, Config()))
    names = [name for name in values if name.startswith("optimizer.") and "learning" not in name]
    own = [f" --config.{name}={values[name]}" for name in names if values[name] != usual[name]]
    return " --config.init_moments=true" + "".join(own)


def _require_old_tokens(new: pathlib.Path, old: pathlib.Path, vocab_size: int) -> None:
    """Raise ConfigError if a tokenizer lacks a token of the run's under its id, or has too many."""
    after, before = (tokenizer.load_tokenizer(path).get_vocab() for path in (new, old))
    other = [word for word, one in before.items() if after.get(word) != one]
    if other:
        raise ConfigError(
            f"--tokenizer={new} has {len(other)} tokens of the run not under their ids, such as "
            f"{other[0]!r}. Add tokens to {old}; ids that are there must stay."
        )
    if max(after.values()) >= vocab_size:
        raise ConfigError(
            f"--tokenizer={new} has ids up to {max(after.values())}, the model {vocab_size} "
            "tokens. Pass a larger --vocab_size."
        )


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
    option("--jtok_tables", type=int, default=0, help="of JTok-M in a layer (as many as there are)")
    option("--vocab_size", type=int, default=0, help="tokens (as many as there are)")
    option("--tokenizer", type=pathlib.Path, help="tokenizer.json of more tokens (the run's)")
    option("--keys", choices=KEYS, default="zero", help="new ones; random: as the published code")
    option("--seed", type=int, default=0, help="of new values (0)")
    option("--moments", action="store_true", help="keep those of the optimizer")
    options = vars(parser.parse_args(arguments))
    run, output, words, seed, moments = (
        options.pop(name) for name in ("run", "output", "tokenizer", "seed", "moments")
    )
    with exit_on_error():
        config = grow(run, output, Growth(**options), words=words, seed=seed, moments=moments)
        size = flops.count(config.model, seq_len=1)
        print(f"{output}: {size.backbone:,} parameters and {size.tables:,} of tables")
        own = _options(config) if moments else ""
        other = f" --config.train.seed={config.train.seed + 1}"  # the run's: the same batches
        print(f"train it: --config=configs/pretrained.py:{output}{other}{own}")


if __name__ == "__main__":
    main()
