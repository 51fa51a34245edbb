"""From frames to space and back moves data only; a tiny factorised DiT, sharded by it, equals one process."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dit_group.attention import SequenceParallel
from dit_group.factorised import FrameParallel
from dit_group.plan import Place, Plan, Reshard, Shard, apply_plan
from tests.ranks import leave, run_ranks
from videopipe.exchange import gather_tokens
from videopipe.partition import split_evenly
from videopipe.resharding import Resharding
from videopipe.runtime import Runtime

CHANNELS = 12
# frames and places of each member
CASES: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
    1: [((5,), (7,))],
    2: [((3, 2), (4, 5)), ((0, 3), (2, 0)), ((1, 1), (0, 1))],
    3: [((2, 2, 1), (5, 5, 4)), ((0, 4, 0), (3, 0, 1))],
    5: [((1, 1, 1, 0, 0), (2, 2, 1, 1, 1)), ((3, 3, 3, 2, 2), (1, 1, 0, 0, 0))],
    8: [(split_evenly(5, 8), split_evenly(21, 8)), (split_evenly(13, 8), split_evenly(6, 8))],
}


def clip(batch: int, frames: int, places: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(frames * 100 + places)
    return torch.randn(batch, frames, places, CHANNELS, generator=generator, dtype=torch.float64).to(dtype)


def check_moves(runtime: Runtime) -> int:
    member, checked, exchange = runtime.rank, 0, dist.all_to_all_single
    for (frames, places), batch, dtype in product(CASES[runtime.world_size], (1, 2), (torch.float32, torch.bfloat16)):
        whole = clip(batch, sum(frames), sum(places), dtype)
        own_frames = whole.split(frames, dim=1)[member]
        own_places = whole.split(places, dim=2)[member]
        resharding = Resharding(runtime.exchange_group, frames, places, member)
        sent: list[int] = []

        def count(received: Tensor, x: Tensor, *, watched: list[int] = sent, **more: object) -> dist.Work | None:
            sizes = more["input_split_sizes"]
            assert isinstance(sizes, list)
            watched.append(sum(n for peer, n in enumerate(sizes) if peer != member) * x.element_size())
            return exchange(received, x, **more)

        with pytest.MonkeyPatch.context() as patch:  # a test may look where the code may not
            patch.setattr(dist, "all_to_all_single", count)
            turned = resharding.to_space(own_frames)
            assert torch.equal(turned, own_places), (frames, places)
            assert torch.equal(resharding.to_frames(turned), own_frames), (frames, places)
        if runtime.world_size > 1:
            element = batch * CHANNELS * whole.element_size()
            into = frames[member] * (sum(places) - places[member]) * element
            back = (sum(frames) - frames[member]) * places[member] * element
            assert sent == [into, back]
            assert into == resharding.to_space_bytes(member, batch, CHANNELS, whole.element_size())
            assert back == resharding.to_frames_bytes(member, batch, CHANNELS, whole.element_size())
        # under way together, waited for in another order
        first, second = resharding.start_to_space(own_frames), resharding.start_to_frames(own_places)
        assert torch.equal(second.wait(), own_frames) and torch.equal(first.wait(), own_places)
        checked += 1
    leave(runtime)
    return checked


@pytest.mark.parametrize("world_size", list(CASES))
def test_resharding_equals_slicing_the_whole_tensor(world_size: int) -> None:
    assert set(run_ranks(check_moves, world_size)) == {len(CASES[world_size]) * 4}


# -- a model that knows nothing of it


class AxisAttention(nn.Module):
    """Self-attention along one axis of [B, T, S, C], with rotary angles by the position on that axis."""

    def __init__(self, channels: int, heads: int, axis: int) -> None:
        super().__init__()
        self.heads, self.axis = heads, axis
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        along = x.movedim(self.axis, 2)  # [B, other, length, C]
        q, k, v = (part.unflatten(3, (self.heads, -1)).transpose(2, 3) for part in self.qkv(along * scale).chunk(3, -1))
        positions = torch.arange(q.shape[3], dtype=x.dtype)[:, None]
        angles = positions * 0.7 ** torch.arange(q.shape[4] // 2, dtype=x.dtype)
        attended = F.scaled_dot_product_attention(_turn(q, angles), _turn(k, angles), v)
        return self.out(attended.transpose(2, 3).flatten(3)).movedim(2, self.axis)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class FactorisedBlock(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.spatial = AxisAttention(channels, heads, axis=2)
        self.temporal = AxisAttention(channels, heads, axis=1)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = x + self.spatial(x, scale)
        x = x + self.temporal(x, scale)
        return x + self.mlp(self.norm(x))


class FactorisedDiT(nn.Module):
    """Spatial and temporal attention in turn, [B, T, S, 4] in and out; nothing about ranks."""

    def __init__(self, blocks: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, CHANNELS)
        self.blocks = nn.ModuleList(FactorisedBlock(CHANNELS, heads) for _ in range(blocks))
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, 1 + timestep)
        return self.head(x)


PLAN: Plan = (
    Shard(module="embed", dim=1, stream="video"),
    Reshard(module="blocks.0.temporal"),
    Reshard(module="blocks.1.temporal"),
    Place(module="head", dim=1, stream="video"),
)
SIZES = [(5, 7), (3, 4), (8, 2), (1, 9)]  # frames, places; fewer than members of either


def model_and_input(frames: int, places: int, dtype: torch.dtype) -> tuple[FactorisedDiT, Tensor, Tensor]:
    torch.manual_seed(7)
    model = FactorisedDiT().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    generator = torch.Generator().manual_seed(frames * 10 + places)
    x = torch.randn(2, frames, places, 4, generator=generator, dtype=torch.float64)
    return model.to(dtype), x.to(dtype), torch.tensor(0.3, dtype=dtype)


def relative(ours: Tensor, other: Tensor) -> float:
    assert ours.shape == other.shape and ours.dtype == other.dtype
    return float((ours - other).double().norm() / other.double().norm())


def whole(output: Tensor, parallel: FrameParallel) -> Tensor:
    """[B, T, S, 4] of which each member has its own frames."""
    own, counts = parallel.sequence.video_of(parallel.member), parallel.sequence.video_counts
    return gather_tokens(output[:, own], counts, parallel.group, parallel.member)


@torch.no_grad()
def check_model(runtime: Runtime) -> dict[torch.dtype, float]:
    worst = {torch.float64: 0.0, torch.float32: 0.0}
    parallel = FrameParallel(group=runtime.exchange_group, member=runtime.rank, members=runtime.world_size)
    for (frames, places), dtype in product(SIZES, worst):
        model, x, timestep = model_and_input(frames, places, dtype)
        plain = model(x, timestep)
        handles = apply_plan(model, PLAN, parallel)
        parallel.use(parallel.lay_out(frames, places))
        worst[dtype] = max(worst[dtype], relative(whole(model(x, timestep), parallel), plain))
        for handle in handles:
            handle.remove()
        assert torch.equal(model(x, timestep), plain)
    leave(runtime)
    return worst


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_a_factorised_model_on_several_ranks_equals_one_process(world_size: int) -> None:
    for worst in run_ranks(check_model, world_size):
        assert worst[torch.float64] <= 1e-10 and worst[torch.float32] <= 1e-5, worst


# -- twins


def without_resharding(parallel: FrameParallel) -> Plan:
    """Temporal attention sees the member's own frames only."""
    return tuple(entry for entry in PLAN if not isinstance(entry, Reshard))


def around_the_wrong_axis(parallel: FrameParallel) -> Plan:
    """Spatial attention sees the member's own places only."""
    return (PLAN[0], Reshard(module="blocks.0.spatial"), Reshard(module="blocks.1.spatial"), PLAN[-1])


def places_turned(parallel: FrameParallel) -> Plan:
    """What comes back are the places in another order."""
    to_frames = parallel.resharding.to_frames
    parallel.resharding.to_frames = lambda x: to_frames(x).roll(1, dims=2)  # type: ignore[method-assign]
    return PLAN


TWINS: tuple[Callable[[FrameParallel], Plan], ...] = (without_resharding, around_the_wrong_axis, places_turned)


@torch.no_grad()
def check_twins(runtime: Runtime) -> dict[str, float]:
    found = {}
    model, x, timestep = model_and_input(5, 7, torch.float64)
    plain = model(x, timestep)
    for twin in TWINS:
        parallel = FrameParallel(group=runtime.exchange_group, member=runtime.rank, members=runtime.world_size)
        parallel.use(parallel.lay_out(5, 7))
        handles = apply_plan(model, twin(parallel), parallel)
        found[twin.__name__] = relative(whole(model(x, timestep), parallel), plain)
        for handle in handles:
            handle.remove()
    leave(runtime)
    return found


def test_mistakes_are_far_from_one_process() -> None:
    found = run_ranks(check_twins, 3)[0]
    assert set(found) == {twin.__name__ for twin in TWINS}
    assert min(found.values()) > 1e-3, found


def test_resharding_needs_frames() -> None:
    parallel = SequenceParallel(group=None, member=0, members=1, num_heads=3)
    with pytest.raises(TypeError, match=r"Reshard\(module='blocks.0.temporal'\) needs a FrameParallel"):
        apply_plan(FactorisedDiT(), (Reshard(module="blocks.0.temporal"),), parallel)
