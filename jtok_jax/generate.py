# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.generate: text from a checkpoint of a run, the newest unless --step says.

    python -m jtok_jax.generate --workdir=runs/quickstart --prompt='def ' --tokens=60
Several --prompt options are generated as one batch. The model is split over all devices of the
machine, whatever the mesh of the run.
"""

import argparse
import math
import pathlib

from jtok_jax.data import manifest, tokenizer
from jtok_jax.errors import ConfigError, exit_on_error
from jtok_jax.inference.generator import for_inference, generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.mesh import over_all
from jtok_jax.training.checkpoint import load_params, require_same_tokenizer


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
    option("--data", type=pathlib.Path, help="prepared corpus; default: data.path of the run")
    with exit_on_error():
        run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    """Print every prompt with its continuation up to the end token."""
    if options.tokens < 1 or options.temperature < 0 or options.top_k < 0:
        raise ConfigError("--tokens must be at least 1, --temperature and --top_k at least 0.")
    if not (math.isfinite(options.temperature) and 0 <= options.seed < 2**32):
        raise ConfigError("--temperature must be finite, --seed between 0 and 2^32 - 1.")
    for prompt in options.prompt:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python holds such bytes
            raise ConfigError(f"--prompt={prompt!r} is not UTF-8.")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top_p is {options.top_p}; expected more than 0 and at most 1.")
    choose = lambda config: over_all(config.model)
    saved = load_params(options.workdir, choose, step=options.step)
    config = saved.config
    if not options.data and not config.data.path:
        raise ConfigError("The run used synthetic data and has no tokenizer to write text with.")
    folder = options.data or pathlib.Path(config.data.path)
    found = manifest.read_manifest(folder)
    require_same_tokenizer(saved, found.tokenizer_sha256, folder)
    encoder = tokenizer.load_tokenizer(folder / tokenizer.FILE_NAME)
    # The model saw the end token before every document; it also starts an empty prompt.
    prompts = [
        [found.end_id, *encoder.encode(text, add_special_tokens=False).ids]
        for text in options.prompt
    ]
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    ids_BT = generate(
        config.model,
        for_inference(config.model, saved.params),
        prompts,
        tokens=options.tokens,
        sampling=sampling,
        seed=options.seed,
        end_id=found.end_id,
    )
    for text, prompt, ids in zip(options.prompt, prompts, ids_BT.tolist(), strict=True):
        if found.end_id in ids:
            ids = ids[: ids.index(found.end_id)]
        # Some tokenizers write a token otherwise at the start of a text: so the whole of it.
        start = encoder.decode(prompt[1:])
        print(f"--- step {saved.step} ---\n{text}{encoder.decode(prompt[1:] + ids)[len(start) :]}")


if __name__ == "__main__":
    main()
