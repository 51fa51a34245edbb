"""The mother of the ranks of one host: imports everything once, then forks a process for each rank.

Forking from a process that has imported torch and diffusers, but has run nothing, starts a rank in tens of
milliseconds instead of seconds, and the ranks share the memory of all code. It never touches CUDA and has one thread,
so the fork is safe. It ends its ranks when told to, and when its standard input closes, which happens however the
engine dies: no rank is ever left behind.

Protocol: one JSON object a line. In: {"start": RankSpec}, {"signal": [pid, number]}. Out, with the token of the run:
{"token": ..., "rank": [rank, pid]} when it has started, with the exit code (or minus the signal) at the end when it has
ended.
"""

import contextlib
import ctypes
import importlib
import os
import selectors
import shutil
import signal
import sys
from typing import Any, NamedTuple

import msgspec

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """`python -m pipelines.zygote MODULE...`: preload the modules, then serve standard input."""
    # whatever an import prints must not look like an answer
    answers = os.dup(1)
    os.dup2(2, 1)
    for module in ("pipelines.rank", *argv):
        importlib.import_module(module)
    _Zygote(answers).serve()
    return 0


class _Child(NamedTuple):
    """A forked rank."""

    token: str
    rank: int
    pid: int


class _Zygote:
    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._run_directories: set[str] = set()
        self._children: dict[int, _Child] = {}  # by pidfd
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Until standard input closes."""
        self._selector.register(0, selectors.EVENT_READ)
        buffer = b""
        while True:
            for key, _ in self._selector.select():
                if key.fd != 0:
                    self._reap(key.fd)
                    continue
                data = os.read(0, 1 << 20)
                if not data:
                    self._end()
                    return
                buffer += data
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    self._obey(msgspec.json.decode(line))

    def _obey(self, command: dict[str, Any]) -> None:
        if "start" in command:
            self._fork(command["start"])
        elif "signal" in command:
            pid, number = command["signal"]
            if any(child.pid == pid for child in self._children.values()):
                os.kill(pid, number)

    def _fork(self, raw: Any) -> None:
        from pipelines.launch import RankSpec  # loaded by main, after fd 1 was moved
        from pipelines.rank import run_rank

        spec = msgspec.convert(raw, RankSpec)
        self._run_directories.add(spec.run_directory)
        mother = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != mother:
                    os._exit(1)
                os.close(self._answers)
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                self._selector.close()
                for fd in self._children:
                    os.close(fd)
                code = run_rank(spec)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # no exit handlers of the mother's, no waiting for gloo's threads
        fd = os.pidfd_open(pid)
        self._children[fd] = _Child(spec.token, spec.rank, pid)
        self._selector.register(fd, selectors.EVENT_READ)
        self._answer({"token": spec.token, "rank": [spec.rank, pid]})

    def _reap(self, fd: int) -> None:
        child = self._children.pop(fd)
        self._selector.unregister(fd)
        os.close(fd)
        _, status = os.waitpid(child.pid, 0)
        self._answer({"token": child.token, "rank": [child.rank, child.pid, os.waitstatus_to_exitcode(status)]})

    def _end(self) -> None:
        """The engine is gone, or has said goodbye: end what is left, remove what runs have left in shared memory."""
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        for fd in list(self._children):
            self._reap(fd)
        for directory in self._run_directories:
            shutil.rmtree(directory, ignore_errors=True)

    def _answer(self, answer: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more; closed standard input ends the loop
            os.write(self._answers, msgspec.json.encode(answer) + b"\n")


if __name__ == "__main__":
    # tearing down an interpreter that holds all of diffusers takes a second, and there is nothing left to save
    os._exit(main(sys.argv[1:]))
