"""In which order a rank obeys: as it was told, but finished latents leave before steps that still wait."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

from pipelines.launch import RankSpec
from pipelines.rank import _Rank
from videopipe.control import ControlClient, ControlServer
from videopipe.messages import (
    Envelope,
    FinishDenoise,
    LatentsReady,
    Release,
    RunStep,
    SendLatents,
    StopRank,
    ToRank,
)
from videopipe.runtime import Runtime
from videopipe.trace import SpanRecorder

SEND = SendLatents(request="a", to=(1,), transfer=1)
STEPS = [RunStep(request="b", step=step) for step in range(2)]
RELEASE = Release(request="a", what="latents")
FINISH = FinishDenoise(request="b")


class Watched(_Rank):
    """Does nothing but note its commands; the engine may say more while it is at one of them."""

    def __init__(self, client: ControlClient, server: ControlServer) -> None:
        runtime = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dit_ranks=(0,))
        super().__init__(cast(RankSpec, None), runtime, client, SpanRecorder(0))
        self.done: list[ToRank] = []
        self.said_during: dict[ToRank, list[ToRank]] = {}
        self._server = server

    def _execute(self, message: ToRank, payload: bytes | None) -> None:
        for more in self.said_during.get(message, ()):
            assert self._server.send(0, more)
            assert self._client.socket.poll(2000)
        self.done.append(message)


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Watched]:
    token = secrets.token_hex(8)
    server = ControlServer(f"ipc://{tmp_path}/control", token)
    client = ControlClient(server.endpoint, token, 0)
    client.send(Envelope(message=LatentsReady(request="hello")))
    assert server.socket.poll(5000)
    server.receive()
    yield Watched(client, server)
    client.close()
    server.close()


def told(rank: Watched, *commands: ToRank) -> list[ToRank]:
    for command in (*commands, StopRank()):
        assert rank._server.send(0, command)
    assert rank._client.socket.poll(5000)
    rank.obey()
    return rank.done


def test_commands_are_obeyed_in_the_order_in_which_they_were_given(rank: Watched) -> None:
    assert told(rank, *STEPS, FINISH, RELEASE) == [*STEPS, FINISH, RELEASE]


def test_latents_leave_before_steps_that_were_given_earlier(rank: Watched) -> None:
    rank._todo.extend((step, None) for step in STEPS)
    assert told(rank, SEND, RELEASE) == [SEND, *STEPS, RELEASE]


def test_latents_leave_after_the_step_that_runs(rank: Watched) -> None:
    rank._todo.extend((step, None) for step in STEPS)
    rank.said_during = {STEPS[0]: [SEND], STEPS[1]: [StopRank()]}
    rank.obey()
    assert rank.done == [STEPS[0], SEND, STEPS[1]]


def test_nothing_after_the_stop_is_obeyed(rank: Watched) -> None:
    rank._todo.append((StopRank(), None))
    assert told(rank, *STEPS) == []
