# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Settings every test needs: a compilation cache that survives from run to run."""

import os
import pathlib
import shutil

from pythons import FAST_TO_COMPILE

# The CPU also where a GPU or a compile-only plugin is at hand; JAX_PLATFORMS=cuda overrides it.
# Both must be set before JAX starts.
PLATFORMS = os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = os.environ.get("XLA_FLAGS", "")
if PLATFORMS == "cpu" and "optimization_level" not in FLAGS:  # others as users have them
    os.environ["XLA_FLAGS"] = f"{FLAGS} {FAST_TO_COMPILE}"

import jax
import pytest
from drawn import FIRST, SEED, left_out
from small import FREQUENT, prepare_small_corpus

from jtok_jax import scone
from train import train

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".pytest_cache" / "xla"

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(config, items):
    """Begin with the long ones; draw cases, unless some tests were asked for by name."""
    items.sort(key=lambda item: item.path.stem not in FIRST)
    if config.option.keyword or any("::" in one for one in config.args):
        return
    others = set(left_out(items))
    config.hook.pytest_deselected(items=list(others))
    items[:] = [item for item in items if item not in others]


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"LAYOUT_SEED={SEED} draws the same cases again")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared corpus: 40 documents of made-up words, windows of 64 tokens.

    Beside it are its frequent n-grams, as many as `with_every_table` reads.
    """
    folder = prepare_small_corpus(tmp_path_factory.mktemp("corpus"))
    scone.build(folder, folder / FREQUENT, max_n=3, rows=119, min_count=2, workers=1)
    return folder


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Workdir of a finished run of the module's `config`."""
    folder = tmp_path_factory.mktemp("finished")
    train(config, folder)
    return folder


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it, which a test may change."""
    return shutil.copytree(finished, tmp_path / "run")
