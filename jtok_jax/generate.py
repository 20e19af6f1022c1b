# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.generate: text from a checkpoint of a run, the newest unless --step says.

    python -m jtok_jax.generate --workdir=runs/quickstart --prompt='def ' --tokens=60
Several --prompt options are generated as one batch. The model is split over all devices of the
machine, whatever the mesh of the run.
"""

import argparse
import pathlib

from jtok_jax.errors import ConfigError, exit_on_error
from jtok_jax.inference.sampling import Sampling
from jtok_jax.loading import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.generate", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--workdir", required=True, type=pathlib.Path, help="folder of a run of train.py")
    option("--step", default="newest", help="of a checkpoint; or newest, best (newest)")
    option("--prompt", required=True, action="append", help="may be given several times")
    option("--tokens", type=int, default=64, help="tokens to add (64)")
    option("--temperature", type=float, default=0.8, help="0: the most likely token (0.8)")
    option("--top_k", type=int, default=0, help="only the k most likely tokens; 0: all (0)")
    option("--top_p", type=float, default=0.95, help="only the most likely mass (0.95)")
    option("--seed", type=int, default=0)
    option(
        "--data", type=pathlib.Path, help="prepared corpus, for its tokenizer; default: the run's"
    )
    with exit_on_error():
        run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    """Print every prompt with its continuation up to the end token."""
    if options.tokens < 1 or not 0 <= options.seed < 2**32:
        raise ConfigError("--tokens must be at least 1, --seed between 0 and 2^32 - 1.")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    sampling.check()
    for prompt in options.prompt:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python holds such bytes
            raise ConfigError(f"--prompt={prompt!r} is not UTF-8.")
    loaded = load(options.workdir, data=options.data, step=options.step)
    texts = loaded.generate(
        options.prompt, tokens=options.tokens, sampling=sampling, seed=options.seed
    )
    for text in texts:
        print(f"--- step {loaded.step} ---\n{text}")


if __name__ == "__main__":
    main()
