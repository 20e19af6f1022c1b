# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Check what benchmarks/gpu.py runs on: card, driver, packages, sources. Standard library only."""

import contextlib
import hashlib
import importlib.metadata
import math
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
WHEELS = ROOT / "benchmarks" / "wheels.txt"
PYTHON, JAX = (3, 12), "0.11.2"
CAPABILITY, CARD_GIB = 9.0, 40
DRIVERS = {13: 580, 12: 525}  # the oldest by version of CUDA
DISK_MIB = 64
PIP_SECONDS = 120
COMMIT = "commit.txt"  # beside the wheels
FETCH = "python benchmarks/gpu.py --fetch --wheels=FOLDER"
QUERY = (
    "name", "count", "compute_cap", "driver_version", "memory.total", "memory.used", "clocks.sm",
    "clocks.max.sm", "clocks.mem", "power.limit",
)  # fmt: skip
TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
# Every Python process that a step starts ends with the one that started it, however that ends.
DIE_WITH_PARENT = """import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
"""
PROBE = """
import importlib, importlib.metadata as metadata, sys, tomllib
from packaging.requirements import Requirement
import jax
for text in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    need = Requirement(text)
    try:
        found = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        sys.exit(f"{need.name} is not installed")
    if found not in need.specifier:
        sys.exit(f"{need.name} is {found}, expected {need.specifier}")
for name in ("jtok_jax.training.step", "jtok_jax.data.loader", "jtok_kernels"):
    importlib.import_module(name)
names = ("jax", "jaxlib", "flax", "optax", "numpy")
try:
    print(jax.default_backend())
except RuntimeError:  # the platform asked for is not there
    print("cpu")
print(", ".join(f"{name} {metadata.version(name)}" for name in names))
"""


class Card(NamedTuple):
    """The GPU that is used, as nvidia-smi tells."""

    name: str
    free_gib: float  # NaN: unknown
    lines: tuple[str, ...]  # for the head of a log
    number: str = "0"  # as CUDA_VISIBLE_DEVICES takes it


def fail(what: str):
    """End with one line that says what is wrong and what to do."""
    raise SystemExit(f"gpu.py: {what}")


def find_card() -> Card:
    """Return the first card, or first of CUDA_VISIBLE_DEVICES; end where the kernels cannot run."""
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    words = ["nvidia-smi", "-i", number, f"--query-gpu={','.join(QUERY)}"]
    words += ["--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        found = None
    if not found or found.returncode or not found.stdout.strip():
        fail(f"no NVIDIA card: nvidia-smi -i {number} does not answer. Use a machine with one, or "
             "--rehearse.")  # fmt: skip
    values = [value.strip() for value in found.stdout.strip().splitlines()[0].split(",")]
    told = dict(zip(QUERY, values, strict=True))
    name, (cuda, driver) = told["name"], needed_driver()
    # What nvidia-smi does not know is NaN: no comparison with it is true.
    if _number(told["compute_cap"]) < CAPABILITY:
        fail(f"{name} has compute capability {told['compute_cap']}, the kernels need {CAPABILITY}. "
             "Use an H100, H200 or newer.")  # fmt: skip
    if _number(told["driver_version"].split(".")[0]) < driver:
        fail(f"the driver is {told['driver_version']}, CUDA {cuda} needs {driver}. Use a machine "
             "with a newer driver.")  # fmt: skip
    free = (_number(told["memory.total"]) - _number(told["memory.used"])) / 1024
    if free < CARD_GIB:
        fail(f"{free:.0f} GiB of the memory of {name} are free, {CARD_GIB} are needed. End what "
             "else runs on it, or use a larger card.")  # fmt: skip
    lines = (
        f"card     {name}, compute capability {told['compute_cap']}; number {number}, "
        f"{told['count']} in this machine",
        f"driver   {told['driver_version']}, memory {told['memory.total']} MiB, "
        f"{told['memory.used']} used",
        f"clocks   processors {told['clocks.sm']} of {told['clocks.max.sm']} MHz, memory "
        f"{told['clocks.mem']} MHz, power limit {told['power.limit']} W",
    )
    return Card(name, free, lines, number)


def needed_driver() -> tuple[int, int]:
    """Return (version of CUDA, oldest driver) of the plugin of JAX here; the newest if none is."""
    for cuda, driver in DRIVERS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"jax-cuda{cuda}-plugin")
            return cuda, driver
    return max(DRIVERS.items())


def _number(told: str) -> float:
    """Return a number that nvidia-smi tells; NaN for "[N/A]" and the like."""
    try:
        return float(told)
    except ValueError:
        return math.nan


def stand_in() -> Card:
    """Return what a rehearsal runs on."""
    return Card("no card: rehearsal on a CPU", 1024.0, ("card     none: rehearsal on a CPU",))


def fetch(folder: pathlib.Path) -> None:
    """Download the wheels for the machine with the card; needs a network, no card."""
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    words += [f"--python-version={PYTHON[0]}.{PYTHON[1]}", "--implementation=cp"]
    words += [f"--platform={tag}_x86_64" for tag in TAGS] + ["-d", str(folder), "-r", str(WHEELS)]
    folder.mkdir(parents=True, exist_ok=True)
    _pip(words, "pip could not fetch the wheels")
    (folder / COMMIT).write_text(" ".join(sources()) + "\n")
    sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.whl"))
    for name, size in sizes:
        print(f"{size / 1e6:6.1f} MB  {name}")


def install(wheels: pathlib.Path, site: pathlib.Path) -> None:
    """Unpack the wheels of the list into `site`."""
    chosen = []
    for name, version in wanted():
        found = sorted(wheels.glob(f"{name}-{version}-*.whl"))
        if not found:
            others = ", ".join(file.name for file in wheels.glob(f"{name}-*.whl")) or "no other"
            fail(f"{wheels} has no wheel of {name} {version} ({others}). Fetch it where there is "
                 f"a network: {FETCH}")  # fmt: skip
        chosen += map(str, found)
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    words += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--target"]
    _pip([*words, str(site), *chosen], f"a wheel in {wheels} does not install; fetch anew, {FETCH}")


def wanted() -> list[tuple[str, str]]:
    """Return (name, version) of every wheel of the list."""
    lines = [line.split("#")[0].strip() for line in WHEELS.read_text().splitlines()]
    return [tuple(line.split("==")) for line in lines if line]


def _pip(words: list[str], what: str) -> None:
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        fail(f"{what}: pip took more than {PIP_SECONDS} s")
    errors = [line for line in found.stderr.splitlines() if line.startswith("ERROR")]
    if found.returncode:
        fail(f"{what}: {(errors or found.stderr.strip().splitlines() or ['?'])[-1]}")


def environment(site: pathlib.Path, found: Card, rehearse: bool) -> dict[str, str]:
    """Return the environment of every step; `site` holds the wheels and comes first."""
    (site / "sitecustomize.py").write_text(DIE_WITH_PARENT)
    paths = [site, ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
        "CUDA_VISIBLE_DEVICES": found.number,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # numbers as nvidia-smi has them
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "JAX_COMPILATION_CACHE_DIR": str(site / "compiled"),  # plans and inputs of later steps
        "JAX_PLATFORMS": "cpu" if rehearse else "cuda,cpu",  # tests would take the CPU
    }


def check_packages(env: dict[str, str], rehearse: bool) -> str:
    """Return the versions in that environment; end where a package does not fit."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info[:2] != PYTHON:
        fail(f"this is Python {here}, the wheels are for {PYTHON[0]}.{PYTHON[1]}. Start this file "
             "with that one.")  # fmt: skip
    env = env | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    words = [sys.executable, "-c", PROBE]
    try:
        found = subprocess.run(
            words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        fail("importing JAX took more than 120 s. Look at the card with nvidia-smi.")
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["?"])[-1]
        fail(f"a package is missing or wrong: {reason}. Pass --wheels=FOLDER; what "
             f"{WHEELS.name} lacks, add there and fetch: {FETCH}")  # fmt: skip
    platform, versions = found.stdout.strip().splitlines()[-2:]
    if platform != ("cpu" if rehearse else "gpu"):
        fail(f"JAX runs on the {platform} here. Install jax[cuda13]=={JAX}.")
    if f"jax {JAX}," not in versions:
        print(f"note: {versions.split(',')[0]}; the wheels are chosen for jax {JAX}", flush=True)
    return f"Python {here}, {versions}"


def check_disk(folder: pathlib.Path) -> None:
    """End where results would not fit."""
    free = shutil.disk_usage(folder).free >> 20
    if free < DISK_MIB:
        fail(f"{free} MiB are free in {folder}, {DISK_MIB} are needed. Make room; what is finished "
             "stays.")  # fmt: skip


def sources(wheels: pathlib.Path | None = None) -> tuple[str, str]:
    """Return (commit, digest) of the code that runs.

    Where git knows no commit, that of --fetch counts if it was of the same code.
    """
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "configs", "jtok_jax", "kernels", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    digest = digest.hexdigest()[:12]
    if not commit and wheels and (wheels / COMMIT).exists():
        fetched, of = (wheels / COMMIT).read_text().split()
        commit = fetched if of == digest else ""
    return commit or "unknown", digest
