"""What the members of a team give of one clip: their rows reach their place, by file or by wire, and are told."""

import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.parallel import decode_team
from pipelines.rank import _locate
from tests.ranks import RanksError, leave, run_ranks
from vae_group.decode import to_frames
from vae_group.retry import together
from vae_group.team import Part, Team
from vae_group.worker import VaeWorker
from videopipe.geometry import VideoSpec
from videopipe.handover import ArrivingClip, write_rows
from videopipe.messages import DecodeLatents, FramesReady, FromRank, LatentsArrived, ResultReady
from videopipe.records import VideoRequest
from videopipe.runtime import PeerLink, Runtime
from videopipe.trace import SpanRecorder

LATENT_SHAPE = (1, 4, 3, 5, 2)
SPEC = VideoSpec(height=10, width=4, num_frames=9)
REQUEST = VideoRequest(id="fox", prompt="", spec=SPEC, num_inference_steps=1)
Reports = list[tuple[FromRank, bytes | None]]


def latents() -> Tensor:
    return torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(0))


def whole_video(latents: Tensor) -> Tensor:
    """Every frame and row of its own: [1, 3, 9, 10, 4]."""
    video = latents[:, :3].repeat_interleave(3, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    return torch.tanh(video + torch.linspace(-1, 1, video[0, 0].numel()).view(video.shape[2:]))


def whole_frames() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return to_frames(whole_video(latents())).numpy()


class RowsOfTheWhole:
    """Each member decodes all and gives its rows, some frames at a time; the first member has none of four."""

    def __init__(self, team: Team, frames_each: int) -> None:
        self._team = team
        self._frames_each = frames_each

    def parts(self, latents: Tensor) -> Iterator[Part]:
        video = whole_video(latents)
        member, members = self._team.member, self._team.members
        bounds = [0, *sorted([3, 0, 8, 5][: members - 1]), SPEC.height]
        rows = slice(bounds[member], bounds[member + 1])
        for first in range(0, SPEC.num_frames, self._frames_each):
            if members > 1:
                dist.barrier(group=self._team.group)  # in step: a member that left out one call would hang the others
            yield Part(
                video=video[:, :, first : first + self._frames_each, rows],
                first_frame=first,
                first_row=rows.start,
                setting="large" if first < 8 else "small",
            )

    def to_frames(self, video: Tensor, dtype: torch.dtype) -> Tensor:
        return to_frames(video, dtype)


def decode_as_a_rank(
    runtime: Runtime,
    team: tuple[int, ...],
    file: str,
    by_wire: tuple[int, ...],
    result: str,
    frames_each: int,
    deaf: int | None,
) -> Reports:
    """The leader sends, its team decodes; what each rank reported."""
    link, reports = PeerLink(runtime), Reports()

    def report(message: FromRank, payload: memoryview | None) -> None:
        reports.append((message, None if payload is None else bytes(payload)))

    assert runtime.decode_team == (team if runtime.rank in team else ())
    if runtime.is_leader:
        for rank in team:
            link.send(latents(), rank, 7)
    if runtime.rank in team and runtime.rank != deaf:
        message = DecodeLatents(
            request=REQUEST,
            source=0,
            shape=LATENT_SHAPE,
            sequence=1,
            transfer=7,
            result=result,  # type: ignore[arg-type]
            path=None if runtime.rank in by_wire else file,
        )
        decoder = RowsOfTheWhole(decode_team(runtime), frames_each)
        VaeWorker(runtime, link, decoder, SpanRecorder(runtime.rank), report).decode(message)
    leave(runtime)
    return reports


def decoded(
    tmp_path: Path,
    world_size: int,
    team: tuple[int, ...],
    *,
    by_wire: tuple[int, ...] = (),
    result: str = "uint8",
    frames_each: int = 4,
    deaf: int | None = None,
) -> tuple[ArrivingClip, list[Reports]]:
    """The clip as ranks of this host wrote it, and what all ranks said."""
    shape = LATENT_SHAPE if result == "latents" else (SPEC.num_frames, SPEC.height, SPEC.width, 3)
    clip = ArrivingClip(tmp_path / "clip", shape, "float32" if result == "latents" else result)
    arguments = (team, str(clip.path), by_wire, result, frames_each, deaf)
    reports = run_ranks(
        decode_as_a_rank, world_size, *arguments, dit_ranks=(0,), decode_teams=(team,), timeout=5.0 if deaf else 60.0
    )
    return clip, reports


def assemble(clip: ArrivingClip, reports: list[Reports]) -> list[range]:
    """As the engine does, one message of each rank in turn; the frames that became whole."""
    told = []
    for index in range(max(len(said) for said in reports)):
        for said in reports:
            message, payload = said[index] if index < len(said) else (None, None)
            if not isinstance(message, FramesReady):
                continue
            if payload is not None:
                rows = np.frombuffer(payload, clip.dtype).reshape(message.count, message.rows, *clip.shape[2:])
                write_rows(clip.path, rows, message.first_frame, message.first_row, clip.shape[1])
            told.append(clip.arrived(message.first_frame, message.count, message.rows))
    return [news for news in told if news]


@pytest.mark.parametrize(
    ("world_size", "team", "by_wire"),
    [
        (1, (0,), ()),
        (2, (1,), (1,)),
        (2, (0, 1), ()),  # colocated: the leader is a member
        (3, (1, 2), (2,)),
        (5, (1, 2, 3, 4), (1, 2, 3, 4)),
        (5, (1, 2, 3, 4), ()),
    ],
)
def test_a_teams_parts_make_the_clip(
    tmp_path: Path, world_size: int, team: tuple[int, ...], by_wire: tuple[int, ...]
) -> None:
    clip, reports = decoded(tmp_path, world_size, team, by_wire=by_wire)
    told = assemble(clip, reports)
    assert told == [range(4), range(4, 8), range(8, 9)]  # in three pieces, in the order of time
    assert np.array_equal(clip.claim(), whole_frames())
    for rank, said in enumerate(reports):
        kinds = [type(message) for message, _ in said]
        if rank not in team:
            assert kinds == []
            continue
        assert (kinds[0], kinds[-1]) == (LatentsArrived, ResultReady)
        assert set(kinds[1:-1]) <= {FramesReady}
        assert said[-1][0] == ResultReady(request="fox", settings=("large", "small")), "each once, in order"
        parts = [(message, payload) for message, payload in said if isinstance(message, FramesReady)]
        assert all((payload is not None) == (rank in by_wire) for _, payload in parts)
        assert len(parts) == (0 if len(team) == 4 and rank == team[0] else 3)  # who has no rows tells of none


def test_a_clip_without_one_members_rows_is_not_complete(tmp_path: Path) -> None:
    clip, reports = decoded(tmp_path, 3, (1, 2))
    assert assemble(clip, reports[:2]) == []
    assert not clip.complete


def test_float_frames_come_from_a_team_too(tmp_path: Path) -> None:
    clip, reports = decoded(tmp_path, 3, (1, 2), result="float32", by_wire=(1,))
    assemble(clip, reports)
    assert np.array_equal(clip.claim(), to_frames(whole_video(latents()), torch.float32).numpy())


@pytest.mark.parametrize("by_wire", [(), (1,)])
def test_latents_come_from_the_first_member_alone(tmp_path: Path, by_wire: tuple[int, ...]) -> None:
    clip, reports = decoded(tmp_path, 3, (1, 2), result="latents", by_wire=by_wire)
    assert [type(message) for message, _ in reports[2]] == [LatentsArrived, ResultReady]
    assert assemble(clip, reports) == [range(1)]
    assert np.array_equal(clip.claim(), latents().numpy())


def wait_for_a_slow_member(runtime: Runtime) -> tuple[bool, str]:
    """What the heartbeat would tell of this rank while it waits for another one of its team, or makes it wait."""
    found = []
    main = threading.main_thread().ident
    assert main is not None
    watch = threading.Timer(0.5, lambda: found.append(_locate(sys._current_frames()[main])))
    watch.start()
    together(decode_team(runtime), runtime.device, partial(time.sleep, 1.5 * (1 - runtime.rank)))
    watch.join()
    leave(runtime)
    return found[0]


def test_a_member_that_waits_is_not_taken_for_the_one_that_hangs() -> None:
    slow, waiting = run_ranks(wait_for_a_slow_member, 2, decode_teams=((0, 1),))
    assert (slow[0], waiting[0]) == (False, True)
    assert slow[1].startswith("vae_group/retry.py") and waiting[1].startswith("vae_group/retry.py")


def test_a_member_that_is_skipped_leaves_the_others_waiting(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="still ran after"):
        decoded(tmp_path, 3, (1, 2), deaf=2)
