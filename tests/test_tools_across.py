# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""evaluate and generate of one run on other devices than it was trained on, as a user runs them."""

import re
import shutil

import numpy as np
import pytest
from pythons import oldest
from test_hosts import ends, free_address
from test_hosts import start as start_on
from test_resume import records, start

FEW = {"train.steps": 6, "checkpoint.every": 6, "evaluation.every": 6, "evaluation.batch_size": 8}
LOSS = r"step 6: validation loss ([\d.]+) nats/token, ([\d.]+) bits/byte"

pytestmark = oldest


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tools") / "run"
    process = start(workdir, corpus, FEW)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return workdir


def tool(name: str, workdir, *options: str, devices: int = 1):
    return start_on(["-m", f"jtok_jax.{name}", f"--workdir={workdir}", *options], devices=devices)


def check_losses(out: str, workdir, *, rtol: float = 1e-5) -> None:
    found, last = re.search(LOSS, out), records(workdir)[-1]
    expected = last["val_loss"], last["val_bpb"]
    np.testing.assert_allclose([float(x) for x in found.groups()], expected, rtol=rtol)


@pytest.mark.parametrize(("devices", "options", "mesh"), [
    (8, (), "data 8, fsdp 1, expert 1, tensor 1"),
    (4, ("--config.mesh.fsdp=2", "--config.mesh.table_rows=fsdp", "--batch_size=12"), "rows over"),
])  # fmt: skip
def test_evaluation_on_several_devices(finished, devices, options, mesh):
    [(code, out, err)] = ends([tool("evaluate", finished, *options, devices=devices)])
    assert code == 0, err
    assert mesh in out
    check_losses(out, finished)


TABLES = {"device": (), "memory": ("--table_memory=host",), "int8": ("--table_dtype=int8",)}


@pytest.mark.parametrize("place", TABLES)
def test_evaluation_by_two_processes(finished, tmp_path, place):
    """Two processes of two devices evaluate; one prints. Each keeps its devices' columns."""
    tables = [*TABLES[place], *[f"--table_folder={tmp_path}"] * (place == "int8")]

    def evaluate() -> list[tuple[int, str, str]]:
        given = "--num_processes=2", f"--coordinator_address={free_address()}"
        options = *given, "--config.mesh.fsdp=4", *tables
        return ends([
            tool("evaluate", finished, *options, f"--process_id={i}", devices=2) for i in range(2)
        ])  # fmt: skip

    (code, out, err), (other, out_1, err_1) = evaluate()
    assert (code, other) == (0, 0), err + err_1
    assert "mesh: data 1, fsdp 4" in out
    assert "nats" not in out_1
    check_losses(out, finished, rtol=1e-3 if place == "int8" else 1e-5)
    if place == "int8":  # one process finds its files, the other makes its own anew
        assert len(list(tmp_path.glob("process-?-of-2/tables.json"))) == 2
        shutil.rmtree(tmp_path / "process-1-of-2")
        assert [found[0] for found in evaluate()] == [0, 0]
        assert len(list(tmp_path.glob("process-?-of-2/tables.json"))) == 2
    assert not (finished / "starting").exists()


def test_generation_on_eight_devices_writes_what_one_writes(finished):
    options = "--prompt=abc", "--prompt=", "--tokens=5", "--temperature=0"
    texts = ends([tool("generate", finished, *options, devices=devices) for devices in (1, 8)])
    (code, out, err), (other, out_8, err_8) = texts
    assert (code, other) == (0, 0), err + err_8
    assert out == out_8
    assert out.count("--- step 6 ---") == 2


@pytest.mark.parametrize(("options", "message"), [
    (("--config.mesh.fsdp=3",), "mesh.fsdp x expert x tensor is 3, which does not divide the 2"),
    (("--config.mesh.fsdp=0",), "mesh.fsdp is 0"),
    (("--batch_size=3",), "(evaluate: --batch_size) is 3; expected a multi"),
    (("--batch_size=0",), "evaluation.batch_size is 0"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(finished, options, message):
    [(code, _, err)] = ends([tool("evaluate", finished, *options, devices=2)])
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_processes_leave_no_folder_where_there_is_no_run(tmp_path):
    given = "--num_processes=2", f"--coordinator_address={free_address()}", "--process_id=0"
    [(code, _, err)] = ends([tool("evaluate", tmp_path / "misspelt", *given)])
    assert code == 4
    assert "holds no checkpoints folder" in err
    assert not (tmp_path / "misspelt").exists()
