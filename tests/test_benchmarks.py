# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""benchmarks/gpu.py without a GPU: what it does with steps, signals and bad input."""

import importlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from pythons import oldest

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
SMI = "NVIDIA H200, 8, 9.0, 580.159.04, 143771, 10, 345, 1980, 3201, 700.00"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def timing(monkeypatch):
    module = importlib.import_module("timing")
    monkeypatch.setattr(module, "_LOST", [])
    return module


@pytest.fixture
def gpu(monkeypatch):
    """The module on a machine that says it has a card."""
    module, card = importlib.import_module("gpu"), importlib.import_module("card")
    monkeypatch.setattr(card, "find_card", lambda: card.Card("a card", 100.0, ("card  a card",)))
    monkeypatch.setattr(card, "check_packages", lambda *_: "jax 1.2.3")
    return module


def step(gpu, name: str, code: str, group="kernels", **options):
    given = {"estimate": 1, "limit": 60} | options
    return gpu.Step(name, group, f"-c {shlex.quote(code)}", "", **given)


def run(gpu, monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    return gpu.main()


def fake_smi(folder: pathlib.Path, monkeypatch, code: str) -> None:
    fake = folder / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def is_gone(pid: str) -> bool:
    state = pathlib.Path("/proc", pid, "stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


@oldest
def test_steps_end_in_a_table_whatever_becomes_of_them_and_go_on(gpu, tmp_path, monkeypatch):
    steps = [
        step(gpu, "slow", PARENT, limit=2),
        step(gpu, "wrong", "print('reason'); raise SystemExit(7)"),
        step(gpu, "large", "", needs=101),
        step(gpu, "long", "", estimate=571),
        step(gpu, "right", "import os; print(os.environ['JAX_PLATFORMS'])", "steps"),
    ]
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert run(gpu, monkeypatch, f"--out={tmp_path}") == 4
    log = (tmp_path / "kernels.txt").read_text()
    assert is_gone(re.search(r"^(\d+)$", log, re.MULTILINE)[1])  # what the step had started
    assert "step slow: stopped at its limit of 2 s after" in log
    assert "reason\nstep wrong: exit code 7 after" in log
    assert "step large: skipped, it needs 101 GiB of the card and has 100" in log
    assert "step long: skipped, it takes about 571 s" in log
    assert "cuda,cpu\nstep right: exit code 0" in (tmp_path / "steps.txt").read_text()
    table = (tmp_path / "README.md").read_text()
    row = re.compile(r"^\| \[(\w+)\]\(\w+.txt\) .*\| (\w+)[^|]*\| \d+ \|$", re.MULTILINE)
    assert row.findall(table) == [
        ("slow", "stopped"), ("wrong", "exit"), ("large", "skipped"), ("long", "skipped"),
        ("right", "exit"),
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) <= 8

    monkeypatch.setattr(gpu, "STEPS", [step(gpu, "wrong", "print('mended')"), steps[-1]])
    assert run(gpu, monkeypatch, f"--out={tmp_path}") == 0
    assert (tmp_path / "kernels.txt").read_text().startswith(log)
    assert (tmp_path / "steps.txt").read_text().count("step right starts") == 1


@oldest
def test_a_step_done_with_other_sources_is_done_again(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STEPS", [step(gpu, "one", "")])
    for digest, starts in (("a", 1), ("a", 1), ("b", 2), ("b", 2), ("a", 3)):
        monkeypatch.setattr(gpu.card, "sources", lambda *_, digest=digest: ("1a2b", digest))
        assert run(gpu, monkeypatch, f"--out={tmp_path}", "--only=kernels") == 0
        assert (tmp_path / "kernels.txt").read_text().count("step one starts") == starts
    assert gpu.ended(tmp_path, "kernels", "c")["one"][0] == "exit code 0, with other sources"


@oldest
def test_setting_up_counts_to_the_time_of_a_group(gpu, tmp_path, monkeypatch):
    late, clock = [0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + late[0])
    monkeypatch.setattr(gpu.card, "check_packages", lambda *_: late.__setitem__(0, 560))
    monkeypatch.setattr(gpu, "STEPS", [step(gpu, "long", "", estimate=11), step(gpu, "one", "")])
    assert run(gpu, monkeypatch, f"--out={tmp_path}", "--only=kernels") == 1
    log = (tmp_path / "kernels.txt").read_text()
    assert re.search(r"step long: skipped, it takes about 11 s and the group has (9|10) left", log)
    assert re.search(r"step one: exit code 0", log)
    monkeypatch.setattr(gpu.card, "PIP_SECONDS", 0.1)
    with pytest.raises(SystemExit, match=r"^gpu.py: fetch anew: pip took more than 0\.1 s$"):
        gpu.card._pip(["sleep", "9"], "fetch anew")


@oldest
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_steps_end_with_the_command_and_start_again(gpu, tmp_path, monkeypatch, how):
    steps = [step(gpu, "first", ""), step(gpu, "second", PARENT)]
    code = f"""if 1:
        import sys, card, gpu
        card.find_card, card.check_packages = card.stand_in, lambda *_: ""
        gpu.STEPS = [gpu.Step(*x) for x in {[tuple(one) for one in steps]!r}]
        sys.exit(gpu.main())"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    words = [sys.executable, "-c", code, f"--out={tmp_path}"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)  # fmt: skip
    pid = next(line.strip() for line in process.stdout if line.strip().isdigit())
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert how == signal.SIGKILL or "ended by SIGTERM; finished steps stay" in errors
    until = time.monotonic() + 20
    while not is_gone(pid):
        assert time.monotonic() < until
        time.sleep(0.05)
    second = gpu.ended(tmp_path, "kernels", gpu.card.sources()[1])["second"][0]
    assert second == ("cut off" if how == signal.SIGKILL else "ended by a signal")
    monkeypatch.setattr(gpu, "STEPS", [steps[0], step(gpu, "second", "")])
    assert run(gpu, monkeypatch, f"--out={tmp_path}") == 0
    log = (tmp_path / "kernels.txt").read_text()
    assert [log.count(f"step {name} starts") for name in ("first", "second")] == [1, 2]


@oldest
@pytest.mark.parametrize(
    ("smi", "message"),
    [
        ("exit 9", "no NVIDIA card: nvidia-smi -i 0 does not answer. Use a machine"),
        (f"echo '{SMI.replace('9.0,', '8.0,')}'", "compute capability 8.0, the kernels need 9.0"),
        (f"echo '{SMI.replace('580', '550')}'", "driver is 550.159.04, CUDA 13 needs 580"),
        (f"echo '{SMI.replace(' 10,', ' 120000,')}'", "23 GiB of the memory of NVIDIA H200 are"),
    ],
)
def test_a_card_that_does_not_fit_is_named_in_one_line(tmp_path, monkeypatch, smi, message):
    gpu = importlib.import_module("gpu")
    fake_smi(tmp_path, monkeypatch, smi)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit, match=message) as ended:
        run(gpu, monkeypatch, f"--out={tmp_path / 'out'}")
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "out").exists()


@oldest
def test_one_card_of_several_is_asked_and_used(tmp_path, monkeypatch):
    card, gpu = importlib.import_module("card"), importlib.import_module("gpu")
    fake_smi(tmp_path, monkeypatch, f'[ "$1 $2" = "-i 3" ] && echo "{SMI}"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    found = card.find_card()
    assert "number 3, 8 in this machine" in found.lines[0]
    assert card.environment(tmp_path, found, rehearse=False)["CUDA_VISIBLE_DEVICES"] == "3"
    unknown = "NVIDIA GB10, 1, 12.1, [N/A], [N/A], [Not Supported], 345, 1980, [N/A], [N/A]"
    fake_smi(tmp_path, monkeypatch, f"echo '{unknown}'")
    found = card.find_card()
    assert "memory [N/A] MiB" in found.lines[1]
    assert gpu.obstacle(step(gpu, "one", ""), found, left=60) is None


@oldest
@pytest.mark.parametrize(("plugin", "driver"), [(12, 525), (13, 580), (None, 580)])
def test_the_driver_fits_the_plugin_of_jax(monkeypatch, plugin, driver):
    card = importlib.import_module("card")

    def version(name: str) -> str:
        if name != f"jax-cuda{plugin}-plugin":
            raise card.importlib.metadata.PackageNotFoundError
        return "0.11.2"

    monkeypatch.setattr(card.importlib.metadata, "version", version)
    assert card.needed_driver() == (plugin or 13, driver)


@oldest
def test_the_commit_of_the_wheels_counts_where_the_code_is_the_same(tmp_path, monkeypatch):
    card = importlib.import_module("card")
    assert card.sources()[0] != "unknown"
    monkeypatch.setattr(card, "_pip", lambda *_: None)
    card.fetch(tmp_path / "wheels")
    assert tuple((tmp_path / "wheels" / card.COMMIT).read_text().split()) == card.sources()
    monkeypatch.setattr(card, "ROOT", tmp_path)  # no repository, no code
    commit, digest = card.sources(tmp_path / "wheels")
    assert commit == "unknown"
    (tmp_path / "wheels" / card.COMMIT).write_text(f"1a2b {digest}\n")
    assert card.sources(tmp_path / "wheels") == ("1a2b", digest)


@oldest
def test_the_table_shows_parts_and_what_is_not_known(timing, tmp_path, monkeypatch):
    summary, path = importlib.import_module("summary"), tmp_path / "figures"
    monkeypatch.setenv("FIGURES", str(path))
    monkeypatch.setenv("STEP", "one")
    for sources, us in (("old", 1.0), ("new", 2.0)):
        monkeypatch.setenv("SOURCES", sources)
        given = {"dim": 8, "tokens": 4, "us": us}
        timing.record(table="parts", name="plan", share=float("nan"), ratio=None, **given)
        timing.record(table="parts", name="lazy_adam xla", share=50.0, ratio=0.5, **given)
        timing.record(table="steps", config="dense_s", arm="jtok", ratio=float("nan"))
        timing.record(failed="arm", reason=sources)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert summary.read(path, "other") == []
    figures = summary.read(path, "new")
    table = summary.markdown(figures, [], {}, {"one": ("kernels", "exit code 1", 1)})
    assert "| plan, D 8, T 4 | 2 |  |  |\n| lazy_adam xla, D 8, T 4 | 2 | 50 | -50.0 |" in table
    assert "| step dense_s jtok over dense, % | unknown | 4 |" in table
    assert "## Left out\n\n- one, arm: new\n" in table
    table = summary.markdown(figures, [], {}, {"one": ("kernels", "exit code 0", 1)})
    assert "Left out" not in table


@oldest
def test_wheels_and_disks_that_do_not_fit_are_named(gpu, tmp_path, monkeypatch):
    card, flags = importlib.import_module("card"), [f"--out={tmp_path}", f"--wheels={tmp_path}"]
    (tmp_path / "array_record-0.1-py3-none-any.whl").touch()
    with pytest.raises(SystemExit, match=r"no wheel of array_record 0\.8\.6 \(array_record-0\.1"):
        run(gpu, monkeypatch, *flags)
    monkeypatch.setattr(card, "DISK_MIB", 1 << 40)
    with pytest.raises(SystemExit, match=r"MiB are free .* Make room; what is finished stays"):
        run(gpu, monkeypatch, *flags)
    monkeypatch.setattr(card, "DISK_MIB", 0)
    monkeypatch.setattr(gpu, "STEPS", [step(gpu, "one", "")])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(SystemExit, match=r"is full\. Make room and start again"):
        run(gpu, monkeypatch, flags[0])
    with pytest.raises(SystemExit):
        run(gpu, monkeypatch, flags[0], "--only=testing")


@oldest
def test_limits_fit_a_group_and_files_exist(gpu):
    for group in gpu.GROUPS:
        steps = [one for one in gpu.STEPS if one.group == group]
        assert all(one.estimate < one.limit for one in steps)
        assert sum(one.limit for one in steps) <= gpu.GROUP_SECONDS - gpu.SET_UP_SECONDS
    for one in gpu.STEPS:
        words = [word.removeprefix("--config=") for word in one.command.split()]
        files = [word for word in words if word.endswith(".py")]
        assert files
        assert all((ROOT / name).exists() for name in files), one.name
