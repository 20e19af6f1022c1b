# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Several processes as one run: who is here, do all agree, and why does a run end?

JAX's own runtime (jax.distributed) connects the processes, finds by heartbeats that one is gone and
agrees on the step at which all stop. Added here are names, time limits and reasons: what starts a
process (`launch`), who is here while it connects (`roll_call`), facts compared before anything is
compiled (`Hosts.agree`), and a failure on one host told to the others (`Hosts.announce`).
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import jax
import jtok_kernels
from jax._src import distributed  # the key-value store and barriers have no public name

from jtok_jax.config import TrainConfig
from jtok_jax.console import say
from jtok_jax.errors import HostError, JtokError, NonFiniteError, Preempted
from jtok_jax.launch import Launch
from jtok_jax.roll_call import GRACE_SECONDS, roll_call

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections")
ROLL_CALL = "starting"  # folder of the workdir, while processes connect
LEAVE_SECONDS = 2 * GRACE_SECONDS  # how long the others are waited for at the end
ANSWER_SECONDS = 2.5  # how long a process that is alive may take to say so
_POLL_SECONDS = 1.0
_OF_ALL = (NonFiniteError, Preempted)  # errors that all processes raise at the same step
_OF_XLA = (jax.errors.JaxRuntimeError, ValueError)  # a status that XLA has no class for: ValueError
_STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
_OF_A_DISK = "os_error_code"  # in what TensorStore raises, in the words of XLA
_PEER_IS_GONE = re.compile(r"\b(gloo|nccl|unavailable|connection|socket|peer|heartbeat)\b", re.I)


class Hosts:
    """The processes of a run; of one process alone every method is a no-op."""

    def __init__(self, launch: Launch | None = None, *, start_seconds: float = 0.0):
        self._client = distributed.global_state.client if launch else None
        self.process = distributed.global_state.process_id if launch else 0
        self.count = distributed.global_state.num_processes if launch else 1
        self._seconds, self._ended = start_seconds, threading.Event()
        self._leave_seconds, self._names, self._ending = LEAVE_SECONDS, {}, False
        if self._client:
            self._put(f"name/{self.process}", f"{platform.node()}, pid {os.getpid()}")
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def several(self) -> bool:
        """Whether processes were connected."""
        return self._client is not None

    @property
    def lead(self) -> bool:
        """Whether this is the process that prints, locks the workdir and writes metrics."""
        return self.process == 0

    def name(self, process: int) -> str:
        if process not in self._names:
            found = self._try(f"name/{process}") if self._client else platform.node()
            if found is None:
                return f"process {process} of {self.count} (never seen)"
            self._names[process] = found
        return f"process {process} of {self.count} ({self._names[process]})"

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
            error: facts differ; the message has them all.
            HostError: a process did not come in time; the message names it.
        """
        if not self._client:
            return
        until = time.monotonic() + self._seconds
        facts = facts | {"--num_processes": self.count}
        self._put(f"{what}/{self.process}", json.dumps(facts, default=str, sort_keys=True))
        if self.lead:
            verdict = self._compare(what, until)
            self._put(f"{what}/verdict", json.dumps(verdict))
        else:
            found = self._wait(f"{what}/verdict", self._seconds + GRACE_SECONDS)
            verdict = json.loads(found) if found else [f"{self.name(0)} did not answer", ""]
        missing, different = verdict
        if missing:
            raise HostError(
                f"{missing} within {self._seconds:g} s (train.start_seconds) to compare {what}. "
                "Look at what it printed, then start all processes again."
            )
        if different:
            raise error(
                f"The processes of this run differ in {what}:\n{different}\nStart all alike."
            )
        self.name(0)  # known from now on, also when process 0 is gone
        self.stage(f"agreed with all on {what}")

    def _compare(self, what: str, until: float) -> tuple[str, str]:
        """(who did not come, differences to the lead); both empty where all is well."""
        texts = {
            process: self._wait(f"{what}/{process}", until - time.monotonic())
            for process in range(self.count)
        }
        missing = [self.name(process) for process, text in texts.items() if text is None]
        if missing:
            return f"{', '.join(missing)} did not come", ""
        own, lines = json.loads(texts[0]), []
        for process, text in texts.items():
            other = json.loads(text)
            lines += [
                f"  {key}: {own.get(key)!r} on {self.name(0)}, {other.get(key)!r} on "
                f"{self.name(process)}"
                for key in sorted(own.keys() | other.keys())
                if own.get(key) != other.get(key)
            ]
        return "", "\n".join(lines)

    def check_shared(self, path: pathlib.Path) -> None:
        """Raise HostError unless all processes read at `path` what the lead reads there."""
        if not self._client:
            return
        if self.lead:
            self._put("shared", path.read_text())
        wanted = self._wait("shared", self._seconds)
        until = time.monotonic() + self._seconds / 2
        while not (path.exists() and path.read_text() == wanted):  # network file systems are late
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
            with contextlib.suppress(Exception):  # told already, or there is nobody to tell
                self._put("failed", json.dumps([self.process, code, reason]), overwrite=False)

    def leave_if_alone(self, kind, error, trace) -> None:
        """For `ExitStack.push`: a save that is pending cannot end where one process fails alone."""
        if self._client and error is not None and not isinstance(error, _OF_ALL):
            self.leave(error)

    def leave(self, error: BaseException) -> None:
        """Say why, tell the others, wait until they end too, and exit. Never returns."""
        if self._ending:
            time.sleep(2 * LEAVE_SECONDS)  # what broke here is a consequence of what was told
        self._ended.set()
        code, reason = _exit_code(error), f"{type(error).__name__}: {error}"
        broken = _of_the_runtime(error)
        if broken:
            code, reason = self._who_is_gone(f"{type(broken).__name__}: {broken}".splitlines()[0])
        self.announce(code, reason)
        if not broken and not isinstance(error, JtokError):
            _tell("".join(traceback.format_exception(error)).rstrip())
        _tell(reason)
        self._exit(code)

    def _who_is_gone(self, reason: str) -> tuple[int, str]:
        """(exit code, reason) after an error that says that another process is gone."""
        hint = "" if self.lead else f"; if JAX aborts here, it was {self.name(0)}"
        _tell(f"HostError: lost another process ({reason}). Asking who is left{hint}.")
        here = set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is left to ask
            self._put(f"asked/{self.process}", "")
            self._put(f"here/{self.process}", "")
            time.sleep(ANSWER_SECONDS)  # who is alive answers, see `_watch`
            told = self._told()
            if told:
                return told.exit_code, f"HostError: {told}"
            found = self._client.key_value_dir_get("jtok/here")
            here = {int(key.split("/")[-1]) for key, _ in found}
        gone = ", ".join(self.name(x) for x in range(self.count) if x not in here)
        self._leave_seconds = 0.0  # all know by themselves, and JAX aborts who waits for long
        return HostError.exit_code, (
            f"HostError: no answer from {gone or 'nobody'} ({reason}). Nothing was saved after the "
            "last checkpoint; the same command on all hosts goes on from there."
        )

    def _watch(self) -> None:
        """Answer who asks if this process is here; end it where another one has failed."""
        answered = False
        while not self._ended.wait(_POLL_SECONDS):
            if not answered and self._client.key_value_dir_get("jtok/asked"):
                self._put(f"here/{self.process}", "")
                answered = True
            told = self._told()
            if told and not self._ended.wait(GRACE_SECONDS):
                self._ending = True
                _tell(f"HostError: {told}")
                self._exit(told.exit_code)

    def _exit(self, code: int) -> None:
        if self._leave_seconds:
            with contextlib.suppress(Exception):
                self._client.wait_at_barrier("jtok/leaving", int(1000 * self._leave_seconds))
        if self.lead:  # its end is the end of the runtime, which aborts who is still there
            time.sleep(2 * _POLL_SECONDS)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)

    def finish(self) -> None:
        self._ended.set()
        if self._client:
            jax.distributed.shutdown()

    # ------------------------------------------------------------------ the runtime's store

    def _put(self, key: str, value: str, *, overwrite: bool = True) -> None:
        self._client.key_value_set(f"jtok/{key}", value, allow_overwrite=overwrite)

    def _try(self, key: str) -> str | None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is none
            return self._client.key_value_try_get(f"jtok/{key}")
        return None

    def _wait(self, key: str, seconds: float) -> str | None:
        """The value of `key`, or None if there is none in time.

        Raises HostError if another process fails in the meantime.
        """
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # not within a second
                return self._client.blocking_key_value_get(f"jtok/{key}", 1000)
            told = self._told()
            if told:
                raise told
            if time.monotonic() >= until:
                return None

    def _told(self) -> HostError | None:
        """What another process announced, with its exit code."""
        told = self._try("failed")
        process, code, reason = json.loads(told) if told else (self.process, 0, "")
        if process == self.process:
            return None
        error = HostError(f"{self.name(process)} has ended: {reason}")
        error.exit_code = code
        return error


ALONE = Hosts()


def _tell(text: str) -> None:
    """To stderr, which may be a file on a disk that is full."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _of_the_runtime(error: BaseException | None) -> Exception | None:
    """The error of an exchange with another process that is, or that caused, `error`."""
    for found in (error, getattr(error, "__cause__", None)):
        own = isinstance(found, JtokError) or not isinstance(found, _OF_XLA)
        own |= _OF_A_DISK in str(found)
        if not own and _STATUS.match(str(found)) and _PEER_IS_GONE.search(str(found)):
            return found
    return None


def _exit_code(error: BaseException) -> int:
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 1


def code_and_versions() -> dict[str, str]:
    """What must be alike on all hosts of a run: the packages that compute, and our own sources."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    digest = hashlib.sha256()
    packages = pathlib.Path(__file__).parent, pathlib.Path(jtok_kernels.__file__).parent
    files = [path for package in packages for path in sorted(package.rglob("*.py"))]
    started = getattr(sys.modules["__main__"], "__file__", None)  # train.py: the order of it all
    for path in (*files, *([pathlib.Path(started)] if started else [])):
        digest.update(path.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    return versions | {"python": python, "jtok_jax sources": digest.hexdigest()[:16]}


@contextlib.contextmanager
def joined(
    launch: Launch | None,
    workdir: pathlib.Path,
    config: TrainConfig,
    lock: Callable[[pathlib.Path], AbstractContextManager],
) -> Iterator[Hosts]:
    """Context of a run of one or more processes, which fail and end together.

    Must be entered before JAX looks for devices.

    Args:
        launch: of `recognise`; None: this process is alone.
        workdir: a folder that all processes share, where they are looked for if one is late.
        config: its start_seconds are the longest wait for all to connect, and for each comparison;
            JAX takes a process silent for heartbeat_seconds for dead and ends the others.
        lock: makes a context of `workdir` that process 0 enters, before it connects if it can.
    """
    if launch is None:
        yield ALONE
        return
    seconds = config.start_seconds
    with contextlib.ExitStack() as stack:
        if launch.process_id == 0:
            stack.enter_context(lock(workdir))
            _require_free(launch.coordinator_address)
        with roll_call(launch, workdir / ROLL_CALL, seconds):
            try:
                jax.distributed.initialize(
                    **launch.arguments(),
                    initialization_timeout=int(seconds) + GRACE_SECONDS,
                    heartbeat_timeout_seconds=config.heartbeat_seconds,
                    shutdown_timeout_seconds=int(seconds),
                )
            except Exception as error:
                raise HostError(
                    f"jax.distributed cannot start ({launch}): {error}\nPass "
                    "--coordinator_address, --num_processes and --process_id, or "
                    "--num_processes=1 to run this process alone."
                ) from error
        hosts = Hosts(launch, start_seconds=seconds)
        hosts.stage(f"connected ({launch})")
        try:
            if hosts.lead and launch.process_id is None:
                stack.enter_context(lock(workdir))
            yield hosts
        except BaseException as error:
            hosts.leave(error)
        hosts.finish()


def _require_free(address: str | None) -> None:
    """Refuse the port of another program: JAX would crash, or take over another run's processes."""
    if address is None:
        return
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise HostError(
                f"Port {port} of --coordinator_address={address} cannot be used here: {error}. "
                "Another run may have it; choose another port for all processes."
            ) from error
