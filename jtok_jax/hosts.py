# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Several processes as one run: do all agree, and why does a run end?

JAX's own runtime (jax.distributed) connects the processes, finds by heartbeats that one is gone and
agrees on the step at which all stop. Added here are names, time limits and reasons: facts compared
before anything is compiled (`Hosts.agree`), and a failure on one process that all others learn of
(`Hosts.announce`). They go through the runtime's key-value store.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
import jtok_kernels
from jax._src import distributed  # the key-value store and barriers have no public name

from jtok_jax.config import TrainConfig
from jtok_jax.config_dict import differences
from jtok_jax.console import say
from jtok_jax.errors import HostError, JtokError, NonFiniteError, Preempted
from jtok_jax.heartbeat import GRACE_SECONDS, heartbeat
from jtok_jax.launch import Launch

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections")
STARTING = "starting"  # folder of the workdir with heartbeats
LEAVE_SECONDS = 2 * GRACE_SECONDS  # how long the others are waited for at the end
ANSWER_SECONDS = 2.5  # how long a process that is alive may take to say so
_POLL_SECONDS = 1.0
# Errors of an exchange as XLA words them: a status, and what is broken. Of a status that XLA has no
# class for JAX makes a ValueError. TensorStore words those of a disk alike, with os_error_code.
_STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
_BROKEN_LINK = re.compile(r"\b(gloo|nccl|unavailable|connection|socket|peer|heartbeat)\b", re.I)


class Hosts:
    """The processes of a run; of one process alone every method is a no-op."""

    def __init__(self, state: distributed.State, *, start_seconds: float = 0.0):
        self._client = state.client
        self.process, self.count = state.process_id, state.num_processes
        self._seconds, self._ended, self._ending = start_seconds, threading.Event(), False
        self._names: dict[int, str] = {}
        if self._client:
            self._put(f"name/{self.process}", f"{platform.node()}, pid {os.getpid()}")
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def lead(self) -> bool:
        """Return whether this is the process that prints, locks the workdir and writes metrics."""
        return self.process == 0

    def name(self, process: int) -> str:
        """Return the number, host and pid of a process."""
        text = self._names.get(process) or self._get(f"name/{process}") or "never seen"
        return f"process {process} of {self.count} ({text})"

    def say(self, text: str) -> None:
        """Print on the lead alone."""
        if self.lead:
            say(text)

    def stage(self, text: str) -> None:
        """Print how far this process has come; nothing where it is alone."""
        if self._client:
            say(f"[{self.name(self.process)}] {text}")

    # ------------------------------------------------------------------ before the run

    def agree(self, what: str, facts: dict[str, object], error: type[JtokError]) -> None:
        """Return when all processes have called this with equal facts.

        Raises:
            error: facts differ; the message has all differences to process 0.
            HostError: a process did not come in time; the message names it.
        """
        if not self._client:
            return
        own = json.dumps(facts | {"--num_processes": self.count}, default=str)
        lead, own = json.loads(self._gather(what, own)[0]), json.loads(own)
        processes = f"on {self.name(0)}", f"on {self.name(self.process)}"
        lines = differences(lead, own, *processes)
        different = self._gather(f"differences in {what}", "\n  ".join(lines))
        text = "\n  ".join(filter(None, different.values()))
        if text:
            raise error(f"The processes of this run differ in {what}:\n  {text}\nStart all alike.")
        self._names = self._of_processes("name")  # kept: the store ends with process 0
        self.stage(f"agreed with all on {what}")

    def _gather(self, what: str, text: str) -> dict[int, str]:
        """Return the texts of all processes, by their number; signals get through meanwhile.

        Raises:
            HostError: a process has failed, or did not come in time; the message names it.
        """
        self._put(f"{what}/{self.process}", text)
        until, wait = time.monotonic() + self._seconds, _POLL_SECONDS / 32
        while len(found := self._of_processes(what)) < self.count:
            failure = self._failure()
            if failure:
                raise failure
            if time.monotonic() > until:
                missing = [self.name(x) for x in range(self.count) if x not in found]
                raise HostError(
                    f"{', '.join(missing)} did not come within {self._seconds:g} s "
                    f"(train.start_seconds) to compare {what}. Look at what it printed, then start "
                    "all processes again."
                )
            time.sleep(wait)
            wait = min(2 * wait, _POLL_SECONDS)
        return found

    def check_shared(self, path: pathlib.Path) -> None:
        """Raise HostError unless all processes read at `path` what the lead reads there."""
        if not self._client:
            return
        if self.lead:
            self._put("shared", path.read_text())
        self.agree("path of the workdir", {}, HostError)  # the lead has put its text before
        text, until = self._get("shared"), time.monotonic() + self._seconds / 2
        while not (path.exists() and path.read_text() == text):  # network file systems are late
            if time.monotonic() > until:
                raise HostError(
                    f"{self.name(self.process)} does not see {path} as {self.name(0)} wrote it. "
                    "--workdir must be one folder that all hosts share."
                )
            time.sleep(_POLL_SECONDS)
        self.agree("workdir", {}, HostError)

    # ------------------------------------------------------------------ the end of a run

    def announce(self, code: int, reason: str) -> None:
        """Tell all others why this process ends, and with which exit code; the first one counts."""
        if self._client:
            with contextlib.suppress(Exception):  # another one was first, or nobody is left
                self._client.key_value_set("jtok/failed", json.dumps([self.process, code, reason]))

    def leave_if_alone(self, kind, error, trace) -> None:
        """Leave at an error of this process alone, for `ExitStack.push`: no pending save can end.

        All processes raise NonFiniteError and Preempted, at the same step.
        """
        if self._client and error and not isinstance(error, NonFiniteError | Preempted):
            self.leave(error)

    def leave(self, error: BaseException) -> None:
        """Print why, announce it, wait until the others end too, and exit. Never returns."""
        if self._ending:
            time.sleep(2 * LEAVE_SECONDS)  # `_watch` ends this process; `error` is a consequence
        self._ended.set()
        code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
        code, reason = code if isinstance(code, int) else 1, f"{type(error).__name__}: {error}"
        broken, wait = _broken_link(error), LEAVE_SECONDS
        if broken:
            code, reason = self._who_is_gone(broken)
            wait = LEAVE_SECONDS if self._failure() else 0.0  # JAX aborts who waits for the dead
        self.announce(code, reason)
        if not broken and not isinstance(error, JtokError):
            _print_error("".join(traceback.format_exception(error)).rstrip())
        _print_error(reason)
        self._exit(code, wait)

    def _who_is_gone(self, broken: str) -> tuple[int, str]:
        """Return an exit code and a reason after an exchange with another process broke."""
        hint = "" if self.lead else f"; if JAX aborts here, it was {self.name(0)}"
        _print_error(f"HostError: lost another process ({broken}). Asking who is left{hint}.")
        present = {}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is left to ask
            self._put("asked", "")
            self._put(f"present/{self.process}", "")
            time.sleep(ANSWER_SECONDS)  # who is alive answers, see `_watch`
            failure = self._failure()
            if failure:
                return failure.exit_code, f"HostError: {failure}"
            present = self._of_processes("present")
        gone = ", ".join(self.name(x) for x in range(self.count) if x not in present)
        return HostError.exit_code, (
            f"HostError: no answer from {gone or 'nobody'} ({broken}). Nothing was saved after the "
            "last checkpoint; the same command on all hosts goes on from there."
        )

    def _watch(self) -> None:
        """Answer who asks if this process is here; end it where another one has failed."""
        while not self._ended.wait(_POLL_SECONDS):
            if self._get("asked") is not None:
                self._put(f"present/{self.process}", "")
            failure = self._failure()
            if failure and not self._ended.wait(GRACE_SECONDS):
                self._ending = True
                _print_error(f"HostError: {failure}")
                self._exit(failure.exit_code)

    def _exit(self, code: int, wait: float = LEAVE_SECONDS) -> None:
        """End the process at once, after at most `wait` seconds for the others to come as far."""
        if wait:
            with contextlib.suppress(Exception):
                self._client.wait_at_barrier("jtok/leaving", int(1000 * wait))
        if self.lead:  # its end is the end of the runtime, which aborts who is still there
            time.sleep(2 * _POLL_SECONDS)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)

    def finish(self) -> None:
        """Disconnect, when all others do."""
        self._ended.set()
        jax.distributed.shutdown()

    # ------------------------------------------------------------------ the runtime's store

    def _put(self, key: str, value: str) -> None:
        self._client.key_value_set(f"jtok/{key}", value, allow_overwrite=True)

    def _get(self, key: str) -> str | None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is none
            return self._client.key_value_try_get(f"jtok/{key}")
        return None

    def _of_processes(self, folder: str) -> dict[int, str]:
        """Return what processes have put under `folder`, by their number."""
        found = self._client.key_value_dir_get(f"jtok/{folder}/")
        return {int(key.split("/")[-1]): value for key, value in found}

    def _failure(self) -> HostError | None:
        """Return what another process announced, as an error with its exit code."""
        text = self._get("failed")
        process, code, reason = json.loads(text) if text else (self.process, 0, "")
        if process == self.process:
            return None
        error = HostError(f"{self.name(process)} has ended: {reason}")
        error.exit_code = code
        return error


ALONE = Hosts(distributed.State())


def _print_error(text: str) -> None:
    """Print to stderr, which may be a file on a disk that is full."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _broken_link(error: BaseException) -> str | None:
    """Return the first line of the broken exchange that is `error` or caused it."""
    for found in (error, error.__cause__):
        text = str(found)
        of_xla = isinstance(found, jax.errors.JaxRuntimeError | ValueError) and _STATUS.match(text)
        if of_xla and _BROKEN_LINK.search(text) and "os_error_code" not in text:
            return f"{type(found).__name__}: {text}".splitlines()[0]
    return None


def code_and_versions() -> dict[str, str]:
    """Return what must be alike on all hosts: packages that compute, and a hash of our sources."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    packages = pathlib.Path(__file__).parent, pathlib.Path(jtok_kernels.__file__).parent
    files = [path for package in packages for path in sorted(package.rglob("*.py"))]
    main = getattr(sys.modules["__main__"], "__file__", None)  # train.py: the order of it all
    files += [pathlib.Path(main)] if main else []
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    python = ".".join(platform.python_version_tuple()[:2])
    return versions | {"python": python, "jtok_jax sources": digest[:16]}


@contextlib.contextmanager
def joined(launch: Launch | None, workdir: pathlib.Path, config: TrainConfig) -> Iterator[Hosts]:
    """Connect the processes of a run, which fail and end together. JAX must not have devices yet.

    Args:
        launch: of `recognise`; None: this process is alone.
        workdir: a folder that all processes share, where they are looked for if one is late.
        config: its start_seconds are the longest wait for all to connect, and for each comparison;
            JAX takes a process silent for heartbeat_seconds for dead and ends the others.
    """
    if launch is None:
        yield ALONE
        return
    if launch.process_id == 0 and launch.coordinator_address:
        _require_free(launch.coordinator_address)
    with heartbeat(launch, workdir / STARTING, config.start_seconds):
        _initialize(launch, config)
    hosts = Hosts(distributed.global_state, start_seconds=config.start_seconds)
    hosts.stage(f"connected ({launch})")
    try:
        yield hosts
    except BaseException as error:
        hosts.leave(error)
    hosts.finish()


def _initialize(launch: Launch, config: TrainConfig) -> None:
    arguments = launch._asdict()
    del arguments["launcher"]
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(config.start_seconds) + GRACE_SECONDS,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=int(config.start_seconds),
        )
    except Exception as error:
        raise HostError(
            f"jax.distributed cannot start ({launch}): {error}\nPass --coordinator_address, "
            "--num_processes and --process_id, or --num_processes=1 to run this process alone."
        ) from error


def _require_free(address: str) -> None:
    """Refuse the port of another program: JAX would crash, or take over another run's processes."""
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise HostError(
            f"Port {port} of --coordinator_address={address} cannot be used here: {error}. "
            "Another run may have it; choose another port for all processes."
        ) from error
