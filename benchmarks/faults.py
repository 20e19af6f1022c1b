# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Damages a checkpoint in many ways, and counts what is noticed, harmless or neither.

    python benchmarks/faults.py --workdir=runs/quickstart --flips=150 --blocks=50

Each fault is made in a copy of the newest checkpoint alone, which is then read as a resumed run
reads it. "harmless": it was read, and every array is what was saved.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jtok_jax.errors import CheckpointError
from jtok_jax.mesh import make_mesh
from jtok_jax.training.checkpoint import Checkpoints, named_leaves
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.saved import load_params
from jtok_jax.training.state import abstract_state

BLOCK = 4096
Fault = tuple[str, Callable[[pathlib.Path], None]]  # kind, what is done to the folder


class Reader:
    """Reads a run's newest checkpoint from a folder that holds a copy of it."""

    def __init__(self, workdir: pathlib.Path):
        saved = load_params(workdir)
        self.step, self._config, self._data = saved.step, saved.config, saved.data
        self._end_id = saved.end_id
        optimizer, mesh = make_optimizer(saved.config), make_mesh(saved.config.mesh)
        self._abstract = abstract_state(saved.config, optimizer, mesh)

    def read(self, workdir: pathlib.Path) -> dict[str, np.ndarray]:
        """Return all arrays. Raises CheckpointError: the damage was noticed."""
        checkpoints = Checkpoints(workdir, self._config, data=self._data, end_id=self._end_id)
        with contextlib.closing(checkpoints):
            if checkpoints.latest_step() is None:
                raise CheckpointError("no checkpoint is left")
            return jax.tree.map(np.asarray, named_leaves(checkpoints.restore(self._abstract)))


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a checkpoint that have bytes, relative to it."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.relative_to(folder) for path in found if path.stat().st_size]


def faults(folder: pathlib.Path, flips: int, blocks: int, seed: int) -> Iterator[Fault]:
    """Yield faults; bits and blocks are drawn by their share of all bytes."""
    rng, names = random.Random(seed), files(folder)
    sizes = [(folder / name).stat().st_size for name in names]

    def at(name, place, change):
        def apply(copy: pathlib.Path) -> None:
            with (copy / name).open("r+b") as file:
                file.seek(place)
                old = file.read(BLOCK)
                file.seek(place)
                file.write(change(old))

        return apply

    for count, kind in ((flips, "a bit flipped"), (blocks, "4 KiB zeroed")):
        for _ in range(count):
            (index,) = rng.choices(range(len(names)), sizes)
            place, bit = rng.randrange(sizes[index]), rng.randrange(8)
            flip = lambda old, bit=bit: bytes([old[0] ^ 1 << bit]) + old[1:]
            change = flip if kind == "a bit flipped" else lambda old: bytes(len(old))
            yield kind, at(names[index], place, change)
    for name, size in zip(names, sizes, strict=True):
        cut = rng.randrange(size)
        yield "a file truncated", lambda copy, n=name, c=cut: os.truncate(copy / n, c)
        yield "a file deleted", lambda copy, n=name: (copy / n).unlink()
    for part in sorted({name.parts[0] for name in names if len(name.parts) > 1}):
        yield "a folder deleted", lambda copy, p=part: shutil.rmtree(copy / p)

    def emptied(copy: pathlib.Path) -> None:
        shutil.rmtree(copy)
        copy.mkdir()

    def half_copied(copy: pathlib.Path) -> None:
        for name in names[len(names) // 2 :]:
            (copy / name).unlink()

    yield "an empty folder", emptied
    yield "a half-copied folder", half_copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--workdir", required=True, type=pathlib.Path)
    option("--flips", type=int, default=150)
    option("--blocks", type=int, default=50)
    option("--seed", type=int, default=0)
    options = parser.parse_args()
    reader = Reader(options.workdir)
    folder = options.workdir / "checkpoints" / str(reader.step)
    expected = reader.read(options.workdir)
    counts = collections.defaultdict(collections.Counter)
    for kind, apply in faults(folder, options.flips, options.blocks, options.seed):
        with tempfile.TemporaryDirectory() as copy:
            place = pathlib.Path(copy) / "checkpoints" / str(reader.step)
            shutil.copytree(folder, place)
            apply(place)
            try:
                found = reader.read(pathlib.Path(copy))
                same = all(np.array_equal(found[n], expected[n]) for n in expected)
                counts[kind]["harmless" if same else "UNNOTICED"] += 1
            except CheckpointError:
                counts[kind]["noticed"] += 1
            except Exception as error:
                counts[kind][f"raised {type(error).__name__}"] += 1
    print("| fault | tried | noticed | harmless | other |\n|---|---|---|---|---|")
    for kind, found in counts.items():
        others = {k: v for k, v in found.items() if k not in ("noticed", "harmless")}
        rest = ", ".join(f"{v} {k}" for k, v in others.items())
        shown = found["noticed"], found["harmless"], rest
        print(f"| {kind} | {sum(found.values())} | {' | '.join(map(str, shown))} |")


if __name__ == "__main__":
    main()
