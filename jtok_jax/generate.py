# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.generate: text from a checkpoint of a run, the newest unless --step says.

    python -m jtok_jax.generate --workdir=runs/quickstart --prompt='def ' --tokens=60
    python -m jtok_jax.generate --workdir=runs/quickstart --prompts=prompts.txt
    echo 'def main' | python -m jtok_jax.generate --workdir=runs/quickstart

Several prompts, by --prompt or lines of a file, are generated as one batch. Without any, standard
input is the prompt; at a terminal each line is one. The model is split over all devices here.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator

from jtok_jax.config_dict import add_table_options, table_options
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
    option("--prompt", action="append", default=[], help="may be given several times")
    option("--prompts", type=pathlib.Path, help="a file with a prompt on each line")
    option("--tokens", type=int, default=64, help="tokens to add (64)")
    option("--temperature", type=float, default=0.8, help="0: the most likely token (0.8)")
    option("--top_k", type=int, default=0, help="only the k most likely tokens; 0: all (0)")
    option("--top_p", type=float, default=0.95, help="only the most likely mass (0.95)")
    option("--seed", type=int, default=0)
    option(
        "--data", type=pathlib.Path, help="prepared corpus, for its tokenizer; default: the run's"
    )
    add_table_options(parser)
    with exit_on_error():
        run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    """Print every prompt with its continuation up to the end token."""
    if options.tokens < 1 or not 0 <= options.seed < 2**32:
        raise ConfigError("--tokens must be at least 1, --seed between 0 and 2^32 - 1.")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    sampling.check()
    prompts = [*options.prompt, *_lines(options.prompts)]
    ask = sys.stdin.isatty() and not prompts
    if not prompts and not ask:
        prompts = [sys.stdin.read().removesuffix("\n")]
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python holds such bytes
            raise ConfigError(f"--prompt={prompt!r} is not UTF-8.")
    tables = table_options(options)
    loaded = load(options.workdir, data=options.data, step=options.step, **tables)
    seq_len = loaded.config.train.seq_len
    longest = max((len(loaded.encode(prompt)) for prompt in prompts), default=0) + options.tokens
    if longest > seq_len:
        print(
            f"Note: up to {longest} tokens; the run was trained on {seq_len} at a time, and may "
            "do worse after them.",
            file=sys.stderr,
        )
    made = {"tokens": options.tokens, "sampling": sampling, "seed": options.seed}
    if len(prompts) > 1:
        for text in loaded.generate(prompts, **made):
            print(f"--- step {loaded.step} ---\n{text}")
        return
    print(f"--- step {loaded.step} ---")
    for prompt in _asked() if ask else prompts:
        pieces = [prompt]
        print("" if ask else prompt, end="", flush=True)

        def told(text: str, pieces=pieces) -> None:
            pieces.append(text)
            print(text, end="", flush=True)

        (text,) = loaded.generate([prompt], **made, on_text=told)
        print(text[len("".join(pieces)) :])  # a last character that was cut


def _lines(path: pathlib.Path | None) -> list[str]:
    """Return the lines of a file that are not empty."""
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line] if path else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts={path} cannot be read: {error}.") from error


def _asked() -> Iterator[str]:
    """Yield what is typed, line by line, until Ctrl-D."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


if __name__ == "__main__":
    main()
