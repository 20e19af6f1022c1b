# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.evaluate: loss and bits per byte of a run on the whole held-out set.

python -m jtok_jax.evaluate --workdir=runs/quickstart [--data=FOLDER]
"""

import argparse
import dataclasses
import pathlib

import jax

from jtok_jax.config import MeshConfig
from jtok_jax.data.loader import open_source
from jtok_jax.errors import exit_on_error
from jtok_jax.mesh import check_batch, make_mesh, replicated
from jtok_jax.training.checkpoint import load_params, require_same_tokenizer
from jtok_jax.training.evaluate import evaluate
from jtok_jax.training.step import make_eval_step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.evaluate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--data", default="", help="prepared corpus; default: data.path of the run")
    options = parser.parse_args(arguments)
    with exit_on_error():
        saved = load_params(options.workdir)
        config = saved.config
        if options.data:
            data = dataclasses.replace(config.data, path=options.data, source="prepared")
            config = dataclasses.replace(config, data=data)
        whole = dataclasses.replace(config.evaluation, max_sequences=0)
        source = open_source(dataclasses.replace(config, evaluation=whole))
        if config.data.source == "prepared":
            folder = pathlib.Path(config.data.path)
            require_same_tokenizer(saved, source.fingerprint["tokenizer"], folder)
        # The devices here need not be those of the run: all of them hold all.
        config = dataclasses.replace(config, mesh=MeshConfig(table_columns=""))
        mesh = make_mesh(config.mesh)
        check_batch(mesh, "evaluation.batch_size", config.evaluation.batch_size)
        params = jax.device_put(saved.params, replicated(mesh))
        eval_step = jax.jit(make_eval_step(config, mesh))
        size = config.evaluation.batch_size
        result = evaluate(eval_step, params, source, mesh, batch_size=size)
        print(
            f"step {saved.step}: validation loss {result.val_loss:.6f} nats/token, "
            f"{result.val_bpb:.6f} bits/byte"
        )


if __name__ == "__main__":
    main()
