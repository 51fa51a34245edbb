"""The control plane and what travels beside it: typed messages, no strangers, frames by file, tensors by number."""

import resource
import secrets
import signal
import stat
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
import zmq

from tests.ranks import leave, run_ranks
from videopipe.arrangement import Arrangement, Calibration, Rules, Shape
from videopipe.control import ControlClient, ControlServer
from videopipe.geometry import VideoSpec
from videopipe.handover import ArrivingClip, make_run_directory, write_rows
from videopipe.messages import (
    AbandonRequest,
    Arrange,
    AssistStep,
    BeginDenoise,
    Calibrate,
    Calibrated,
    DecodeLatents,
    EncodePrompt,
    EndDelivery,
    Envelope,
    FinishDenoise,
    FramesReady,
    FromRank,
    Heartbeat,
    Hello,
    LatentsArrived,
    LatentsReady,
    LatentsReturned,
    LoadParts,
    PartsLoaded,
    PrepareAssist,
    PromptEncoded,
    RankFailed,
    Release,
    ResultReady,
    RunStep,
    SendLatents,
    StateFreed,
    StepCompleted,
    StopRank,
    ToRank,
)
from videopipe.records import VideoRequest
from videopipe.runtime import PeerLink, Runtime
from videopipe.trace import Span

REQUEST = VideoRequest(
    id="fox",
    prompt="ein Fuchs im Schnee, 狐",
    negative_prompt="",
    spec=VideoSpec(height=64, width=96, num_frames=9, fps=23.976),
    num_inference_steps=4,
    guidance_scale=0.1 + 0.2,
    seed=2**63 - 1,
)
SHAPE = Shape(num_video=60, num_text=16)
TO_RANK: list[ToRank] = [
    LoadParts(text_encoder=True, denoiser=False, decoder=True),
    EncodePrompt(request=REQUEST, dit_ranks=(0, 1, 2), transfer=7),
    BeginDenoise(request=REQUEST, source=1, nbytes=2**40, transfer=7),
    RunStep(request="fox", step=3, helpers=(2, 4)),
    PrepareAssist(request=REQUEST, text_masks=(b"\x01\x01\x00", b"\x01"), recorded=True),
    AssistStep(request="fox", step=3, helpers=(2, 4)),
    Calibrate(shape=SHAPE, rules=Rules(num_heads=24, members=2, helper_sets=((2,),)), budget_s=4.0),
    Arrange(
        num_video=60, guidance="pair", arrangements=(Arrangement(), Arrangement(helpers=(2,), head_counts=(9, 9, 6)))
    ),
    FinishDenoise(request="fox"),
    AbandonRequest(request="fox"),
    SendLatents(request="fox", to=(3, 4), transfer=8),
    DecodeLatents(request=REQUEST, source=0, shape=(1, 16, 3, 8, 12), sequence=5, transfer=8, result="latents"),
    Release(request="fox", what="conditioning"),
    EndDelivery(request="fox", return_latents=True),
    StopRank(),
]
FROM_RANK: list[FromRank] = [
    Hello(pid=1, host="node-1", device="cuda:0", clock_ns=2**62),
    PartsLoaded(weight_bytes={"denoiser": 26_000_000_000}),
    PromptEncoded(request="fox", nbytes=9),
    StepCompleted(request="fox", step=0),
    LatentsReady(request="fox"),
    StateFreed(request="fox"),
    LatentsArrived(request="fox", sequence=5),
    FramesReady(request="fox", first_frame=8, count=1, first_row=32, rows=32),
    ResultReady(request="fox"),
    LatentsReturned(request="fox", shape=(1, 16, 3, 8, 12)),
    RankFailed(
        kind="OutOfMemoryError",
        message="2 GiB",
        traceback="...",
        stage="denoise",
        request="fox",
        step=3,
        out_of_memory=True,
    ),
    Calibrated(calibration=Calibration(shape=SHAPE, linear_s=0.1, timings=(), chosen=(Arrangement(),), seconds=1.0)),
    Heartbeat(stage=None, request=None, step=None, seconds=0.5, waiting=True, where="videopipe/exchange.py:90"),
]
SPAN = Span(stage="denoise", request="fox", step=3, rank=1, start_ns=1, end_ns=2**62)


class Link:
    """A server, and clients that are connected to it for certain."""

    def __init__(self, directory: Path) -> None:
        self.token = secrets.token_hex(8)
        self.server = ControlServer(f"ipc://{directory}/control", self.token)
        self.clients: list[ControlClient] = []

    def client(self, rank: int, token: str | None = None, channel: str = "main") -> ControlClient:
        client = ControlClient(self.server.endpoint, self.token if token is None else token, rank, channel)
        self.clients.append(client)
        return client

    def receive(self, count: int, timeout_s: float = 5.0) -> list[tuple[int, Envelope, bytes | None]]:
        """At least `count` messages."""
        arrived: list[tuple[int, Envelope, bytes | None]] = []
        deadline = time.monotonic() + timeout_s
        while len(arrived) < count and time.monotonic() < deadline:
            self.server.socket.poll(50)
            arrived += self.server.receive()
        return arrived

    def close(self) -> None:
        for client in self.clients:
            client.socket.close(linger=0)
            client._context.term()
        self.server.close()


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    link = Link(tmp_path)
    yield link
    link.close()


# -- messages


def names(messages: list[Any]) -> set[str]:
    return {type(message).__name__ for message in messages}


def test_every_kind_of_message_is_tried_here() -> None:
    assert names(TO_RANK) == {kind.__name__ for kind in get_args(ToRank)}
    assert names(FROM_RANK) == {kind.__name__ for kind in get_args(FromRank)}


@pytest.mark.parametrize("message", TO_RANK, ids=lambda m: type(m).__name__)
def test_commands_come_back_as_they_were(message: ToRank) -> None:
    again = msgspec.msgpack.Decoder(ToRank).decode(msgspec.msgpack.encode(message))
    assert again == message
    assert type(again) is type(message)


@pytest.mark.parametrize("message", FROM_RANK, ids=lambda m: type(m).__name__)
def test_reports_come_back_as_they_were(message: FromRank) -> None:
    envelope = Envelope(message=message, spans=(SPAN, SPAN), peak_memory_bytes=2**50)
    assert msgspec.msgpack.Decoder(Envelope).decode(msgspec.msgpack.encode(envelope)) == envelope


@pytest.mark.parametrize(
    "twin",
    [
        {"type": "RunStep", "request": "fox", "step": "3"},
        {"type": "RunStep", "request": "fox"},
        {"type": "RunStep", "request": 5, "step": 3},
        {"type": "DropTables", "request": "fox"},
        {"request": "fox", "step": 3},
    ],
)
def test_what_is_no_command_is_refused(twin: dict[str, object]) -> None:
    right = {"type": "RunStep", "request": "fox", "step": 3}
    decoder = msgspec.msgpack.Decoder(ToRank)
    assert decoder.decode(msgspec.msgpack.encode(right)) == RunStep(request="fox", step=3)
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(msgspec.msgpack.encode(twin))


# -- the link


def test_both_directions_carry_messages_and_payloads(link: Link) -> None:
    client = link.client(3)
    client.send(Envelope(message=FROM_RANK[0], spans=(SPAN,)), memoryview(b"latents"))
    assert link.receive(1) == [(3, Envelope(message=FROM_RANK[0], spans=(SPAN,)), b"latents")]
    assert link.server.send(3, TO_RANK[1], b"noise")
    assert client.receive(5) == (TO_RANK[1], b"noise")
    assert link.server.send(3, StopRank())
    assert client.receive(5) == (StopRank(), None)
    assert client.receive(0.01) is None


def test_each_rank_gets_its_own_messages_in_the_order_they_were_sent(link: Link) -> None:
    clients = [link.client(rank) for rank in range(3)]
    for client in clients:
        client.send(Envelope(message=LatentsReady(request="hello")))
    link.receive(3)
    for step in range(200):
        for rank in range(3):
            assert link.server.send(rank, RunStep(request=f"for-{rank}", step=step))
    for rank, client in enumerate(clients):
        received = [client.receive(5) for _ in range(200)]
        assert received == [(RunStep(request=f"for-{rank}", step=step), None) for step in range(200)]
    for step in range(200):
        for client in clients:
            client.send(Envelope(message=StepCompleted(request="fox", step=step)))
    arrived = link.receive(600)
    for rank in range(3):
        steps = [e.message.step for r, e, _ in arrived if r == rank and isinstance(e.message, StepCompleted)]
        assert steps == list(range(200))


def test_a_heartbeat_has_a_channel_of_its_own(link: Link) -> None:
    main, beat = link.client(0), link.client(0, channel="beat")
    beat.send(Envelope(message=FROM_RANK[-1]))
    main.send(Envelope(message=FROM_RANK[4]))
    assert {(rank, type(e.message).__name__) for rank, e, _ in link.receive(2)} == {
        (0, "Heartbeat"),
        (0, "LatentsReady"),
    }
    assert link.server.send(0, StopRank())
    assert main.receive(5) == (StopRank(), None)
    assert beat.receive(0.05) is None


def test_sending_to_a_rank_that_is_not_there_says_so(link: Link) -> None:
    assert not link.server.send(5, StopRank())


@pytest.mark.parametrize("token", ["", "guessed", "a/b", "\u00e9"])
def test_a_stranger_without_the_token_is_not_listened_to(link: Link, token: str) -> None:
    link.client(0, token=token).send(Envelope(message=LatentsReady(request="forged")))
    link.client(1).send(Envelope(message=LatentsReady(request="real")))
    assert [(rank, e.message) for rank, e, _ in link.receive(2, timeout_s=0.5)] == [(1, LatentsReady(request="real"))]
    assert not link.server.send(0, StopRank())


@pytest.mark.parametrize("identity", ["{token}", "{token}/main", "{token}/main/x", "{token}/main/-1", "{token}/root/0"])
def test_an_address_that_is_no_rank_is_not_listened_to(link: Link, identity: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.setsockopt(zmq.IDENTITY, identity.format(token=link.token).encode())
        socket.connect(link.server.endpoint)
        socket.send(msgspec.msgpack.encode(Envelope(message=LatentsReady(request="forged"))))
        link.client(1).send(Envelope(message=LatentsReady(request="real")))
        assert [rank for rank, _, _ in link.receive(2, timeout_s=0.3)] == [1]


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"\xff\xff\xff"],
        [b"not msgpack at all"],
        [msgspec.msgpack.encode({"message": {"type": "LatentsReady"}})],
        [msgspec.msgpack.encode({"message": {"type": "Nonsense", "request": "x"}})],
        [msgspec.msgpack.encode(Envelope(message=LatentsReady(request="x")))[:-1]],
        [b"too", b"many", b"parts"],
    ],
)
def test_malformed_bytes_from_a_rank_are_ignored_and_counted(link: Link, parts: list[bytes]) -> None:
    client = link.client(0)
    client.socket.send_multipart(parts)
    client.send(Envelope(message=LatentsReady(request="good")))
    assert [e.message for _, e, _ in link.receive(1)] == [LatentsReady(request="good")]
    assert link.server.ignored == 1


def test_good_messages_and_strangers_do_not_count_as_malformed(link: Link) -> None:
    link.client(0).send(Envelope(message=LatentsReady(request="good")))
    link.receive(1)
    assert link.server.ignored == 0


# -- frames by file


def frames(seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)


def arriving(path: Path, dtype: str = "uint8") -> ArrivingClip:
    return ArrivingClip(path / "fox-1.frames", (3, 8, 6, 3), dtype)


def write(clip: ArrivingClip, whole: np.ndarray[Any, Any], frames: slice, rows: slice) -> range:
    """One rank's part to its place."""
    part = whole[frames, rows]
    write_rows(clip.path, part, frames.start, rows.start, whole.shape[1])
    return clip.arrived(frames.start, part.shape[0], part.shape[1])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_what_has_arrived_can_be_claimed_once(tmp_path: Path, dtype: str) -> None:
    clip, whole = arriving(tmp_path, dtype), frames().astype(dtype)
    turned = np.ascontiguousarray(whole.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)  # not contiguous
    assert write(clip, turned, slice(0, 3), slice(0, 8)) == range(3)
    claimed = clip.claim()
    assert np.array_equal(claimed, whole)
    assert claimed.dtype == np.dtype(dtype)
    assert list(tmp_path.iterdir()) == []  # unlinked: the memory is freed with the array
    with pytest.raises(FileNotFoundError):
        clip.claim()


def test_frames_are_told_once_and_in_order_however_their_rows_arrive(tmp_path: Path) -> None:
    whole = frames()
    parts = [(slice(f, f + n), slice(*r)) for f, n in ((0, 1), (1, 2)) for r in ((0, 3), (3, 4), (4, 8))]
    for number, order in enumerate(permutations(parts)):
        if number % 7:
            continue
        (tmp_path / str(number)).mkdir()
        clip, seen = arriving(tmp_path / str(number)), 0
        for part in order:
            news = write(clip, whole, *part)
            assert news.start == seen
            seen = news.stop
            assert np.array_equal(clip.look_at(news), whole[news.start : news.stop])
            assert clip.complete == (seen == 3)
        assert np.array_equal(clip.claim(), whole)


def test_what_is_not_there_yet_cannot_be_had(tmp_path: Path) -> None:
    clip, whole = arriving(tmp_path), frames()
    assert write(clip, whole, slice(1, 3), slice(0, 8)) == range(0)  # a later frame is told with the first one
    assert write(clip, whole, slice(0, 1), slice(0, 7)) == range(0)
    for early in (clip.claim, lambda: clip.look_at(range(1, 2))):
        with pytest.raises(AssertionError):
            early()
    assert write(clip, whole, slice(0, 1), slice(7, 8)) == range(3)


def test_parts_that_do_not_fit_are_noticed(tmp_path: Path) -> None:
    clip, whole = arriving(tmp_path), frames()
    with pytest.raises(AssertionError):
        write_rows(clip.path, whole[:, :3], 0, 6, 8)
    with pytest.raises(AssertionError):
        write_rows(clip.path, whole, 1, 0, 8)
    clip.arrived(0, 3, 8)
    with pytest.raises(AssertionError):
        clip.arrived(2, 1, 1)  # rows that were there already


def test_what_is_looked_at_stays_and_cannot_be_changed(tmp_path: Path) -> None:
    clip, whole = arriving(tmp_path), frames()
    write(clip, whole, slice(0, 3), slice(0, 8))
    seen = clip.look_at(range(1, 3))
    with pytest.raises(ValueError, match="read-only"):
        seen[:] = 0
    claimed = clip.claim()
    claimed[:] = 0  # the caller's array is writable, and private
    assert np.array_equal(seen, whole[1:])


def test_latents_arrive_as_one_frame(tmp_path: Path) -> None:
    latents = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(1, 2, 3, 4, 5)
    clip = ArrivingClip(tmp_path / "fox-1.frames", latents.shape, "float32")
    write_rows(clip.path, latents, 0, 0, 2)
    assert clip.arrived(0, 1, 2) == range(1)
    assert np.array_equal(clip.claim(), latents)


def test_a_full_disk_is_an_error_at_the_writer(tmp_path: Path) -> None:
    clip = arriving(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails as on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError):
            write_rows(clip.path, frames(), 0, 0, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_run_directory_is_private() -> None:
    directory = make_run_directory()
    try:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        on_disk = make_run_directory(min_free_bytes=1 << 62)
        assert on_disk.parent != Path("/dev/shm")
        on_disk.rmdir()
    finally:
        directory.rmdir()


# -- tensors by number


def tensor_of(transfer: int, size: int = 1000) -> torch.Tensor:
    return torch.full((size, 2), float(transfer))


def transfer_all(runtime: Runtime) -> None:
    link = PeerLink(runtime)
    me, world = runtime.rank, runtime.world_size
    # everyone sends three tensors to everyone, itself included, before anyone receives: nobody waits for anybody
    for turn in range(3):
        for to in range(world):
            link.send(tensor_of(number(me, to, turn)), to, number(me, to, turn))
    for turn in (2, 0, 1):  # in another order than they were sent
        for source in range(world):
            transfer = number(source, me, turn)
            received = link.receive((1000, 2), torch.float32, source, transfer)
            assert torch.equal(received, tensor_of(transfer)), (source, turn)
            assert not torch.equal(received, tensor_of(number(source, me, (turn + 1) % 3)))
    torch.distributed.barrier(group=runtime.peers)
    for turn in range(3):
        for to in range(world):
            link.forget(number(me, to, turn))
            link.forget(number(me, to, turn))  # twice does no harm
    assert not link._outgoing
    assert not link._local
    # something that nobody will fetch is forgotten, and what comes after it still arrives
    if me == 0:
        link.send(tensor_of(900, 500_000), 1, 900)
        link.forget(900)
        link.send(tensor_of(901), 1, 901)
    elif me == 1:
        assert torch.equal(link.receive((1000, 2), torch.float32, 0, 901), tensor_of(901))
    leave(runtime)


def number(source: int, to: int, turn: int) -> int:
    return 1 + source * 100 + to * 10 + turn


def test_transfers_between_ranks_and_to_oneself_go_by_number() -> None:
    run_ranks(transfer_all, 3)


def transfer_without_numbers(runtime: Runtime) -> bool:
    """The twin: both tensors under one number, taken in the other order."""
    link = PeerLink(runtime)
    in_order = True
    if runtime.rank == 0:
        for value in (1, 2):
            link.send(tensor_of(value), 1, 7)
    else:
        in_order = [float(link.receive((1000, 2), torch.float32, 0, 7)[0, 0]) for _ in range(2)] == [2, 1]
    leave(runtime)
    return in_order


def test_without_numbers_transfers_would_come_in_the_order_of_sending() -> None:
    assert run_ranks(transfer_without_numbers, 2) == [True, False]


def test_a_transfer_to_oneself_of_another_shape_is_an_error() -> None:
    link = PeerLink(Runtime(rank=0, world_size=1, device=torch.device("cpu"), dit_ranks=(0,)))
    link.send(tensor_of(1), 0, 1)
    with pytest.raises(AssertionError):
        link.receive((2, 2), torch.float32, 0, 1)
    with pytest.raises(KeyError):
        link.receive((1000, 2), torch.float32, 0, 2)
