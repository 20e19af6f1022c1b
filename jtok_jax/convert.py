# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.convert: a model of Hugging Face as a run, or a run as one of theirs.

    python -m jtok_jax.convert --from=FOLDER --output=runs/pretrained
    python -m jtok_jax.convert --to=hf --workdir=runs/retrofit --output=FOLDER

FOLDER has config.json, safetensors and tokenizer.json. No code of it is run (docs/pretrained.md).
"""

import argparse
import json
import pathlib
import shutil

import numpy as np

from jtok_jax.config import Config, TrainConfig
from jtok_jax.config_dict import to_dict
from jtok_jax.data import tokenizer
from jtok_jax.data.manifest import file_sha256
from jtok_jax.errors import ConfigError, exit_on_error
from jtok_jax.huggingface.export import export
from jtok_jax.huggingface.folder import Folder, open_folder
from jtok_jax.model.params import to_logical
from jtok_jax.model_config import ModelConfig
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.resume import CONFIG_FILE, keep_tokenizer, new_folder
from jtok_jax.training.saved import load_params

LONGEST = 1024  # most tokens of a sequence in the configuration of a converted run


def from_folder(
    path: pathlib.Path, output: pathlib.Path, *, dtype: str = "", end_token: str = ""
) -> ModelConfig:
    """Write the model of a Hugging Face folder as a run of no steps; return what it is.

    Args:
        dtype: of the parameters, "float32" or "bfloat16"; "": as stored.
        end_token: that stands between documents; "": what config.json says, else the likeliest.

    Raises:
        ConfigError: the architecture is not known, or tensors do not fit it.
        DataError: a file is missing or damaged.
        WorkdirError: `output` holds something, or cannot be written.
    """
    with new_folder(output) as folder:
        opened = open_folder(path, dtype=dtype)
        config = Config(
            model=opened.config, train=TrainConfig(seq_len=min(opened.positions, LONGEST))
        )
        (folder / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=1) + "\n")
        data, end_id = {}, None
        file = opened.path / tokenizer.FILE_NAME
        if file.is_file():
            end_id = _end_id(opened, file, end_token)
            data["tokenizer"] = file_sha256(file)
            keep_tokenizer(folder, file)
        else:
            print(f"{file} is missing: no text can be read or written without it.")
        scratch = folder / "scratch"  # in files: a model may be larger than memory
        scratch.mkdir()
        params = {}
        for name, shape in opened.shapes().items():
            place = scratch / name.replace("/", ".")
            params[name] = np.memmap(place, opened.dtype(name), "w+", shape=shape)
            opened.read_into(name, params[name])
        checkpoints = Checkpoints(folder, config, data=data, end_id=end_id)
        checkpoints.save_params(params)
        checkpoints.close()
        params.clear()
        shutil.rmtree(scratch)
    return opened.config


def to_folder(workdir: pathlib.Path, output: pathlib.Path, *, step: str = "newest") -> ModelConfig:
    """Write a run as a Hugging Face folder, see `jtok_jax.huggingface.export`; return its model.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: transformers has no such model.
        WorkdirError: `output` holds something, or cannot be written.
    """
    saved = load_params(workdir, step=step)
    model = saved.config.model
    with new_folder(output) as folder:
        params = {name: np.asarray(value) for name, value in to_logical(saved.params).items()}
        export(folder, model, params, positions=saved.config.train.seq_len, end_id=saved.end_id)
        keep_tokenizer(folder, workdir / tokenizer.FILE_NAME)
        if saved.end_id is not None and (folder / tokenizer.FILE_NAME).exists():
            encoder = tokenizer.load_tokenizer(folder / tokenizer.FILE_NAME)
            values = {"tokenizer_class": "PreTrainedTokenizerFast"}
            values["eos_token"] = encoder.id_to_token(saved.end_id)
            (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=1) + "\n")
    return model


def _end_id(opened: Folder, path: pathlib.Path, end_token: str) -> int:
    """Return the id of the token between documents."""
    encoder = tokenizer.load_tokenizer(path)
    largest = max(encoder.get_vocab().values())
    if largest >= opened.config.vocab_size:
        raise ConfigError(
            f"{path} has ids up to {largest}, the model rows for {opened.config.vocab_size}: it "
            "does not belong to this model."
        )
    if end_token or opened.end_id is None:
        known = [one for one in tokenizer.END_TOKENS if encoder.token_to_id(one) is not None]
        return tokenizer.end_token_id(encoder, end_token or [*known, tokenizer.END_TOKEN][0])
    return opened.end_id


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.convert", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="path", type=pathlib.Path, help="folder of Hugging Face")
    way.add_argument("--to", choices=("hf",), help="write the run of --workdir as such a folder")
    option("--output", required=True, type=pathlib.Path, help="folder to write")
    option("--dtype", choices=("float32", "bfloat16"), default="", help="(as stored)")
    option("--end_token", default="", help="between documents (that of config.json)")
    option("--workdir", type=pathlib.Path, help="folder of a run, with --to")
    option("--step", default="newest", help="of a checkpoint, with --to; or newest, best (newest)")
    options = parser.parse_args(arguments)
    if options.to and not options.workdir:
        parser.error("--to needs --workdir, the folder of a run")
    with exit_on_error():
        if options.to:
            found = to_folder(options.workdir, options.output, step=options.step)
        else:
            own = {"dtype": options.dtype, "end_token": options.end_token}
            found = from_folder(options.path, options.output, **own)
        told = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
        print(f"{options.output}: {', '.join(f'{name} {getattr(found, name)}' for name in told)}")


if __name__ == "__main__":
    main()
