# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in host memory: text, logits and losses of a run are those of tables on the device."""

import dataclasses

import numpy as np
import pytest
from pythons import OLD
from small import KINDS, with_every_table
from test_config import changed
from test_data import run_config

from jtok_jax.errors import ConfigError
from jtok_jax.evaluate import main as evaluate_main
from jtok_jax.generate import main as generate_main
from jtok_jax.loading import load

# Bits of a program depend on others it is compiled beside, unless code is made in one part.
pytestmark = pytest.mark.skipif(OLD, reason="compiled here as for no user; make test-latest has it")
TEXT = "def main(argv):\n    return argv[0]\n"


@pytest.fixture(scope="module")
def config(corpus):
    """Three steps of a model with every kind of table."""
    jtok = dataclasses.replace(KINDS["dense-jtok_m"].jtok, table_init_std=0.1)
    model = with_every_table(dataclasses.replace(KINDS["dense-jtok_m"], jtok=jtok, vocab_size=300))
    start = dataclasses.replace(run_config(corpus, steps=3), model=model)
    return changed(start, {"optimizer.learning_rate": 0.1})


@pytest.fixture(scope="module")
def runs(finished):
    """The run with its tables on the device and in host memory."""
    return [load(finished, table_memory=memory) for memory in ("device", "host")]


def test_logits_are_equal_and_tables_are_not_on_the_device(runs):
    device, host = runs
    assert np.array_equal(device.logits(TEXT), host.logits(TEXT))
    assert device.token_losses(TEXT) == host.token_losses(TEXT)
    tables = {name for name in device.params if name == "tables" or name.startswith("arms/")}
    assert len(tables) > 2
    assert device.params.keys() - host.params.keys() == tables
    with pytest.raises(ConfigError, match="so no module holds them"):
        _ = host.model


def test_texts_of_prompts_of_several_lengths_are_equal(runs):
    prompts = [TEXT, "import os", "x"]
    expected, found = [run.generate(prompts, tokens=30, seed=3) for run in runs]
    assert found == expected
    assert found != runs[1].generate(prompts, tokens=30, seed=4)


@pytest.mark.parametrize("tool", [
    lambda run, memory: generate_main([f"--workdir={run}", f"--prompt={TEXT}", memory]),
    lambda run, memory: evaluate_main([f"--workdir={run}", memory]),
], ids=["generate", "evaluate"])  # fmt: skip
def test_tools_print_the_same(finished, tool, capsys):
    printed = []
    for memory in "device", "host":
        tool(finished, f"--table_memory={memory}")
        printed.append(capsys.readouterr().out)
    assert "step 3" in printed[0]
    assert printed[0] == printed[1]
