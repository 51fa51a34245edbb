"""Starts and ends the ranks of this host, and tells when one of them dies."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from videopipe.config import Config


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a process needs to become a rank; travels as JSON.

    `store_address` is host:port of the rendezvous store, None for a run of one rank.
    """

    rank: int
    local_rank: int
    world_size: int
    threads: int
    device: str
    endpoint: str
    token: str
    run_directory: str
    store_address: str | None
    store_prefix: str
    config: Config


class RankEnded(msgspec.Struct, frozen=True):
    """A rank's process has ended: its exit code, or minus the signal that killed it."""

    rank: int
    code: int

    def describe(self) -> str:
        """See `describe_exit`."""
        return describe_exit(self.code)


def describe_exit(code: int) -> str:
    """`was killed by SIGKILL` (minus the signal as the code), `exited with code 1`."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def module_environment() -> dict[str, str]:
    """The environment in which `python -m` finds our packages: the checkout need not be the working directory."""
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class Launcher(Protocol):
    """Starts the ranks of one run; the engine polls `fileno` and asks `ended` when it is readable."""

    def start(self, spec: RankSpec) -> None:
        """Start one rank."""

    def fileno(self) -> int:
        """Readable when `ended` has news."""

    def ended(self) -> list[RankEnded]:
        """Ranks that have ended since the last call."""

    def pids(self) -> dict[int, int]:
        """Process ids of the running ranks."""

    def end(self) -> None:
        """End every rank that still runs, at once; returns when they are gone."""

    def close(self) -> None:
        """Listen no more; `end` has been called."""


class LocalLauncher:
    """Starts ranks of this host by forking a zygote (`pipelines.zygote`), which lives in a session of its own.

    Ctrl-C in a terminal therefore reaches the engine alone. The zygote starts at once, so that its imports run while
    the caller still checks its input. It may serve any number of pipelines, each with `ranks_of` its own run; all but
    the first then start in a fraction of a second.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        # a CUDA check by NVML leaves no driver state behind that a fork would break
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.zygote", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**module_environment(), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._lock = threading.Lock()
        self._runs: dict[str, LocalRanks] = {}
        self._reader = threading.Thread(target=self._read, name="videopipe-zygote", daemon=True)
        self._reader.start()

    def ranks_of(self, token: str) -> "LocalRanks":
        """The ranks of the run with that token: what an engine starts, watches and ends."""
        with self._lock:
            run = self._runs[token] = LocalRanks(self)
            if self._process.poll() is not None:
                run.lose_all(self._process.returncode)
            return run

    def forget(self, run: "LocalRanks") -> None:
        """Nobody listens to this run any more."""
        with self._lock:
            self._runs = {token: other for token, other in self._runs.items() if other is not run}

    def ask(self, command: Mapping[str, Any]) -> None:
        """Send a command to the zygote; if it is gone, the ranks' `ended` says so."""
        with self._lock, contextlib.suppress(BrokenPipeError, ValueError):
            self._input.write(msgspec.json.encode(command) + b"\n")

    def close(self) -> None:
        """Close the zygote's input: it ends all ranks and itself."""
        with self._lock:
            if not self._input.closed:
                self._input.close()
        try:
            self._process.wait(timeout=3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its ranks die with it: PR_SET_PDEATHSIG
            self._process.wait()
        self._reader.join()
        self._output.close()

    def _read(self) -> None:
        """Give each answer of the zygote to the run that it is about, until the zygote is gone."""
        buffer = b""
        while data := self._output.read(1 << 16):
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                answer = msgspec.json.decode(line)
                with self._lock:
                    run = self._runs.get(answer["token"])
                if run is not None:
                    run.hear(answer)
        code = self._process.wait()
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            run.lose_all(code)


class LocalRanks:
    """The ranks of one run on this host; see `Launcher`. Other runs of the same launcher are not touched."""

    def __init__(self, launcher: LocalLauncher) -> None:
        self._launcher = launcher
        self._lock = threading.Lock()
        self._pids: dict[int, int] = {}
        self._expected: set[int] = set()
        self._news: list[RankEnded] = []
        self._readable, self._wake = os.pipe()
        self._closed = False
        os.set_blocking(self._readable, False)

    def start(self, spec: RankSpec) -> None:
        """Ask the zygote for a rank."""
        with self._lock:
            self._expected.add(spec.rank)
        self._launcher.ask({"start": spec})

    def fileno(self) -> int:
        """Readable when `ended` has news."""
        return self._readable

    def ended(self) -> list[RankEnded]:
        """Ranks that have ended since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._readable, 4096)
        with self._lock:
            news, self._news = self._news, []
        return news

    def pids(self) -> dict[int, int]:
        """Process ids of the running ranks."""
        with self._lock:
            return dict(self._pids)

    def end(self) -> None:
        """SIGKILL for all: a rank has nothing to save, and it may be stuck in a transfer with a lost one."""
        deadline = time.monotonic() + 4.0
        for pid in self.pids().values():
            self._launcher.ask({"signal": [pid, int(signal.SIGKILL)]})
        while self._left() and time.monotonic() < deadline:
            select.select([self._readable], [], [], 0.05)
            self.ended()
            for pid in self.pids().values():  # also those that were still being started
                self._launcher.ask({"signal": [pid, int(signal.SIGKILL)]})

    def hear(self, answer: Mapping[str, Any]) -> None:
        """From the launcher's thread: the zygote said something about a rank of this run."""
        rank, pid, *code = answer["rank"]
        with self._lock:
            if code:
                self._pids.pop(rank, None)
                self._expected.discard(rank)
                self._news.append(RankEnded(rank, code[0]))
            else:
                self._pids[rank] = pid
            self._tell()

    def lose_all(self, code: int) -> None:
        """From the launcher's thread: the zygote is gone, and with it all its ranks."""
        with self._lock:
            self._news.extend(RankEnded(rank, code) for rank in sorted(self._expected))
            self._expected.clear()
            self._pids.clear()
            self._tell()

    def close(self) -> None:
        """Listen no more; `end` has been called."""
        self._launcher.forget(self)
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._readable)
                os.close(self._wake)

    def _tell(self) -> None:
        if not self._closed:
            os.write(self._wake, b"x")

    def _left(self) -> bool:
        with self._lock:
            return bool(self._expected)
