"""Starts and ends the ranks of this host, and tells when one of them dies."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
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
        """`was killed by SIGKILL`, `exited with code 1`."""
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"exited with code {self.code}"


class Launcher(Protocol):
    """Starts ranks; the engine polls `fileno` and asks `ended` when it is readable."""

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


class LocalLauncher:
    """Ranks of this host, forked from a zygote (`pipelines.zygote`) in a session of its own.

    Ctrl-C in a terminal therefore reaches the engine alone. The zygote starts at once, so that its imports run while
    the caller still checks its input. It may serve several pipelines one after the other, which then start in a
    fraction of a second.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        # a CUDA check by NVML leaves no driver state behind that a fork would break; the checkout need not be the cwd
        package_root = str(Path(__file__).resolve().parent.parent)
        paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.zygote", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._buffer = b""
        self._pids: dict[int, int] = {}
        self._expected: set[int] = set()

    def start(self, spec: RankSpec) -> None:
        """Ask the zygote for a rank."""
        self._expected.add(spec.rank)
        self._ask({"start": spec})

    def fileno(self) -> int:
        """The zygote's answers."""
        return self._output.fileno()

    def ended(self) -> list[RankEnded]:
        """Read the zygote's answers. If the zygote itself is gone, so are all its ranks."""
        news: list[RankEnded] = []
        while True:
            data = self._output.read(1 << 16)
            if data is None:
                return news
            if not data:
                code = self._process.wait()
                news.extend(RankEnded(rank, code) for rank in sorted(self._expected))
                self._expected.clear()
                self._pids.clear()
                return news
            self._buffer += data
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in lines:
                answer = msgspec.json.decode(line)
                if "started" in answer:
                    rank, pid = answer["started"]
                    self._pids[rank] = pid
                elif "ended" in answer:
                    rank, pid, code = answer["ended"]
                    if self._pids.get(rank) == pid:  # else a rank of an earlier pipeline, reaped late
                        del self._pids[rank]
                        self._expected.discard(rank)
                        news.append(RankEnded(rank, code))

    def pids(self) -> dict[int, int]:
        """Process ids of the running ranks."""
        return dict(self._pids)

    def end(self) -> None:
        """SIGKILL for all: a rank has nothing to save, and it may be stuck in a transfer with a lost one."""
        deadline = time.monotonic() + 4.0
        for rank in self._expected:
            self._ask({"signal": [rank, int(signal.SIGKILL)]})
        while self._expected and time.monotonic() < deadline:
            select.select([self._output.fileno()], [], [], 0.1)
            self.ended()
        self._expected.clear()
        self._pids.clear()

    def close(self) -> None:
        """Close the zygote's input: it ends its ranks and itself."""
        if not self._input.closed:
            self._input.close()
        try:
            self._process.wait(timeout=3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its ranks die with it: PR_SET_PDEATHSIG
            self._process.wait()
        self._output.close()

    def _ask(self, command: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # the zygote is gone: `ended` says so
            self._input.write(msgspec.json.encode(command) + b"\n")
