"""Two evaluations in turn on the same ranks give what they give one after the other, to the bit."""

import threading
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dit_group.attention
from dit_group.assist import Assistant
from dit_group.attention import Layout, SequenceParallel
from dit_group.call import run_call
from dit_group.kernels import sdpa
from dit_group.ping_pong import CallInTurns, Turns
from pipelines.checkpoint import Checkpoint
from pipelines.hunyuan_video_parts import HunyuanVideoDenoiser
from pipelines.noise_floor import RankLayout, with_layout
from pipelines.open_sora_plan_attention import GroupParallel
from pipelines.rank import _whereabouts
from tests.ranks import RanksError, leave, run_ranks
from tests.test_cfg_parallel import (
    GUIDED,
    finish,
    osp_checkpoint,  # noqa: F401  a fixture
    start_hunyuan,
    start_osp,
)
from tests.test_sharded_dit import relative
from tests.test_shards import osp_denoiser
from tests.traffic import watched
from tools.make_tiny_checkpoint import make_hunyuan_video
from videopipe.arrangement import Arrangement
from videopipe.config import ConfigError, load_config
from videopipe.exchange import PendingExchange
from videopipe.partition import Mesh, split_evenly
from videopipe.runtime import Runtime

CPU = torch.device("cpu")

# -- who runs when


class Note:
    """A keeper, and what happened."""

    def __init__(self) -> None:
        self.current = ""
        self.events: list[str] = []

    def leave(self) -> str:
        return self.current

    def resume(self, state: str) -> None:
        self.current = state

    def happens(self, what: str) -> None:
        self.events.append(f"{self.current} {what}")


class NotedCall:
    """A layer's attention that computes nothing."""

    def __init__(self, note: Note) -> None:
        self._note = note

    def value(self, v: Tensor) -> None:
        self._note.happens("sends")

    def key(self, k: Tensor) -> None:
        pass

    def query(self, q: Tensor) -> None:
        pass

    def attend(self) -> None:
        self._note.happens("attends")

    def output(self) -> Tensor:
        self._note.happens("takes")
        return torch.zeros(1)


def layers(note: Note, turns: Turns[str], name: str, count: int, fails_in: int | None = None) -> Callable[[], str]:
    def evaluate() -> str:
        note.current = name
        for layer in range(count):
            if layer == fails_in:
                raise ArithmeticError(f"{name} in layer {layer}")
            note.happens("computes")
            run_call(CallInTurns(NotedCall(note), turns), *[torch.zeros(1)] * 3)
        note.happens("ends")
        return name

    return evaluate


def test_one_computes_while_the_others_attention_is_on_its_way() -> None:
    note = Note()
    turns: Turns[str] = Turns((note,), CPU)
    assert turns.run(layers(note, turns, "a", 2), layers(note, turns, "b", 2)) == ("a", "b")
    first = ["a computes", "a sends", "b computes", "b sends", "a attends", "b attends"]
    second = ["a takes", "a computes", "a sends", "b takes", "b computes", "b sends", "a attends", "b attends"]
    assert note.events == [*first, *second, "a takes", "a ends", "b takes", "b ends"]


@pytest.mark.parametrize(("first", "second"), [(3, 1), (1, 3), (0, 2), (2, 0)])
def test_the_longer_one_goes_on_alone(first: int, second: int) -> None:
    note = Note()
    turns: Turns[str] = Turns((note,), CPU)
    assert turns.run(layers(note, turns, "a", first), layers(note, turns, "b", second)) == ("a", "b")
    for name, count in (("a", first), ("b", second)):
        mine = [event for event in note.events if event.startswith(name)]
        assert mine == [
            *[f"{name} {what}" for what in ("computes", "sends", "attends", "takes")] * count,
            f"{name} ends",
        ]


def test_what_is_not_kept_is_mixed_up() -> None:
    note = Note()
    turns: Turns[str] = Turns((), CPU)  # the twin: nobody gives `current` back
    turns.run(layers(note, turns, "a", 2), layers(note, turns, "b", 2))
    assert "a attends" not in note.events


@pytest.mark.parametrize(("which", "layer"), [("a", 0), ("a", 1), ("b", 0), ("b", 1)])
def test_an_error_of_either_ends_both(which: str, layer: int) -> None:
    note, before = Note(), threading.active_count()
    turns: Turns[str] = Turns((note,), CPU)
    both = [layers(note, turns, name, 3, layer if name == which else None) for name in ("a", "b")]
    with pytest.raises(ArithmeticError, match=f"{which} in layer {layer}"):
        turns.run(*both)
    assert threading.active_count() == before
    assert not any(event.endswith(" ends") for event in note.events)


def test_the_second_one_records_gradients_as_the_first_one_does() -> None:
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert Turns((), CPU).run(torch.is_grad_enabled, torch.is_grad_enabled) == (enabled, enabled)


class LookedAt:
    """A transfer that a watcher looks at while it is waited for."""

    def __init__(self, main: int) -> None:
        self._main = main
        self.found: list[tuple[bool, str]] = []

    def wait(self) -> None:
        watcher = threading.Thread(target=lambda: self.found.append(_whereabouts(self._main)))
        watcher.start()
        watcher.join()


def test_a_heartbeat_tells_where_the_evaluation_is_that_runs() -> None:
    x = torch.zeros(1, 1)
    looked_at = [LookedAt(threading.get_ident()) for _ in range(2)]
    turns: Turns[None] = Turns((), CPU)

    def wait_in(work: LookedAt) -> None:
        PendingExchange(cast(dist.Work, work), x, x, [(1, 1)], 1).wait()
        turns.hand_over()

    turns.run(lambda: wait_in(looked_at[0]), lambda: wait_in(looked_at[1]))
    for work in looked_at:
        [(waiting, where)] = work.found
        assert waiting and where.startswith("videopipe/exchange.py"), where


# -- every way to move heads, members and helpers

LAYERS = 2


def evaluation(
    parallel: SequenceParallel, layout: Layout, seed: int, heads: int
) -> tuple[Callable[[], Tensor], Tensor]:
    """Some layers of attention whose inputs follow from the last one's output, and what one process gives."""
    sequence = layout.sequence
    total = sum(sequence.counts)
    whole = torch.randn(1, total, heads, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = getattr(layout.attention, "key_mask", None)

    def mix(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.roll(1, 3), x.sin(), x * 0.5

    expected = whole
    for _ in range(LAYERS):
        expected = sdpa(*mix(expected), mask)
    if layout.member is None:
        return lambda: whole, whole
    start = sum(sequence.counts[: layout.member])
    own = slice(start, start + sequence.counts[layout.member])

    def evaluate() -> Tensor:
        parallel.use(layout)
        x = whole[:, own]
        for _ in range(LAYERS):
            x = parallel.attention(*mix(x))
        return x

    return evaluate, expected[:, own]


def check_ways(runtime: Runtime, swaps: int | None, forgets: bool) -> list[float]:
    """Errors of both branches in every way; where `swaps` is a rank, that one begins with the other branch."""
    world, me = runtime.world_size, runtime.rank
    found = []
    for helpers in range(4):
        members = world - helpers
        lent = tuple(range(members, world))
        groups = {lent: dist.new_group(list(range(world)))} if helpers else {}
        group = dist.new_group(list(range(members)))
        ways: list[dict[str, Any]] = [
            {"heads_per_chunk": chunk, "balance": balance}
            for chunk, balance in product((None, 1, 2), ("heads", "rows"))
        ]
        if helpers:
            shares = (*split_evenly(7 - helpers, members), *[1] * helpers)
            ways += [{"head_counts": shares, "helpers_first": first} for first in (False, True)]
        for way in ways:
            parallel = SequenceParallel(
                group=group,
                member=me if me < members else None,
                members=members,
                num_heads=7,
                rank=me,
                assist_groups=groups,
            )
            arrangement = Arrangement(helpers=lent, in_turns=True, **way)
            parallel.arrange(21, [arrangement], "pair")
            texts = [torch.arange(9)[None] < 9, torch.arange(9)[None] < (9 if swaps is not None else 4)]
            found += run_pair(parallel, texts, lent, me, swaps, forgets, 7)
    leave(runtime)
    return found


def run_pair(
    parallel: SequenceParallel,
    texts: list[Tensor],
    lent: tuple[int, ...],
    me: int,
    swaps: int | None,
    forgets: bool,
    heads: int,
) -> list[float]:
    """Errors of both branches on this rank, none on a helper."""
    if me in lent:
        assistant = Assistant(parallel, kernels=[None] * LAYERS, head_dim=4, dtype=torch.float64, device=CPU)
        assistant.prepare("clip", 21, texts, guidance="pair")
        assistant.step("clip", lent)
        return []
    layouts = [parallel.lay_out(21, 9, text, lent, "pair") for text in texts]
    assert all(layout.in_turns for layout in layouts)
    pairs = [evaluation(parallel, layout, seed, heads) for seed, layout in enumerate(layouts)]
    order = [1, 0] if me == swaps else [0, 1]
    with pytest.MonkeyPatch.context() as patch:
        if forgets:
            patch.setattr(dit_group.attention, "Turns", lambda keepers, device: Turns((), device))
        outs = parallel.in_turns([pairs[i][0] for i in order], (), CPU)
    return [float((out - pairs[i][1]).abs().max()) for i, out in zip(order, outs, strict=True) if out.numel()]


@pytest.mark.parametrize("world_size", [4, 5])
def test_every_way_to_move_heads_in_turns_equals_one_process(world_size: int) -> None:
    found = run_ranks(check_ways, world_size, None, False, timeout=120)
    assert len(found[0]) == 2 * (4 * 6 + 3 * 2)
    assert max(max(errors, default=0.0) for errors in found) <= 1e-10


def test_a_rank_that_begins_with_the_other_branch_is_noticed() -> None:
    """The twin: its exchanges meet those of the other branch. A single DiT rank (the last 8 ways) leads its helpers."""
    errors = run_ranks(check_ways, 4, 0, False, timeout=120)[0][: -2 * 8]
    assert min(max(pair) for pair in zip(errors[::2], errors[1::2], strict=True)) > 1e-3


def test_a_branch_that_does_not_find_its_layout_again_is_noticed() -> None:
    """The twin: the layout in use stays that of the other branch, whose mask hides other tokens."""
    found = run_ranks(check_ways, 4, None, True, timeout=120)
    assert max(found[0]) > 1e-3


def check_rings(runtime: Runtime) -> list[float]:
    members, me = runtime.world_size, runtime.rank
    found = []
    for way in (
        {"strategy": "ring"},
        *({"strategy": "usp", "mesh": Mesh.choose(4, 7, 2, i)} for i in ("ulysses", "ring")),
    ):
        parallel = SequenceParallel(
            group=runtime.exchange_group, member=me, members=members, num_heads=7, ping_pong=True, **way
        )  # type: ignore[arg-type]
        texts = [torch.arange(9)[None] < 9] * 2
        found += run_pair(parallel, texts, (), me, None, False, 7)
    leave(runtime)
    return found


def test_rings_in_turns_equal_one_process() -> None:
    found = run_ranks(check_rings, 4)
    assert len(found[0]) == 6 and max(map(max, found)) <= 1e-10


# -- the real models


def same_bits(runtime: Runtime, hunyuan_path: str, osp_path: str) -> int:
    """Latents of guided requests, in turns and one evaluation after the other."""
    ranks, compared = len(runtime.dit_ranks), 0

    def hunyuan(ping_pong: str, **attention: Any) -> tuple[Tensor, int]:
        """Latents, and the bytes that this rank sent."""
        modulated = attention.pop("modulated", False)
        config = load_config(
            {
                "model": {"weights": hunyuan_path},
                "groups": {"dit_ranks": ranks},
                "attention": {"ping_pong": ping_pong, **attention},
                "memory": {"precompute_modulation": modulated},
            }
        )
        denoiser = HunyuanVideoDenoiser(Checkpoint(hunyuan_path), config, runtime)
        with watched() as traffic:
            return finish(start_hunyuan(denoiser, GUIDED)), traffic.sent()

    for way in (
        {},
        {"text": "padded", "overlap_mlp": False, "heads_per_chunk": 3},
        {"balance": "rows", "heads_per_chunk": 2, "modulated": True},
        {"strategy": "ring"},
    ):
        (in_turns, sent), (one_by_one, expected) = hunyuan("on", **way), hunyuan("off", **way)
        assert torch.equal(in_turns, one_by_one) and sent == expected > 0, way
        compared += 1

    def one_row_after_the_other(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        return first(), second()

    def osp(plain: bool = False) -> Tensor:
        denoiser = osp_denoiser(osp_path, runtime, ping_pong="on", heads_per_chunk=1)
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(Turns, "run", lambda self, *both: one_row_after_the_other(*both))
                patch.setattr(Turns, "hand_over", lambda self: None)
            return finish(start_osp(denoiser))

    rows_in_turns = osp()
    assert torch.equal(rows_in_turns, osp(plain=True))
    as_batch = finish(start_osp(osp_denoiser(osp_path, runtime)))
    assert relative(rows_in_turns, as_batch) <= 1e-5
    leave(runtime)
    return compared


def test_what_is_arranged_decides_whether_branches_take_turns(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Runtime(rank=0, world_size=1, device=CPU, dit_ranks=(0,))
    settings = {"groups": {"dit_ranks": 1}, "attention": {"ping_pong": "auto", "text": "trimmed"}}
    config = load_config({"model": {"weights": str(tiny_checkpoint)}, **settings})
    denoiser, run, turns = HunyuanVideoDenoiser(Checkpoint(str(tiny_checkpoint)), config, alone), Turns.run, []
    assert denoiser.parallel is not None

    def counted(self: Turns[Tensor], *both: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        turns.append(self)
        return run(self, *both)

    monkeypatch.setattr(Turns, "run", counted)
    found = []
    for in_turns in (False, True):
        denoiser.parallel.arrange(30, [Arrangement(in_turns=in_turns)], "pair")
        denoiser.parallel.arrange(30, [Arrangement(in_turns=not in_turns)], "none")  # of requests with one branch
        found.append(finish(start_hunyuan(denoiser, GUIDED)))
        assert len(turns) == (2 if in_turns else 0)  # one for each step
    assert torch.equal(*found)
    with denoiser.observe(lambda name, tensor: None, 0):
        assert torch.equal(finish(start_hunyuan(denoiser, GUIDED)), found[0])
    assert len(turns) == 2  # steps that are recorded do without


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 heads."""
    return make_hunyuan_video(tmp_path_factory.mktemp("wide") / "24", heads=24, seed=1)


@pytest.mark.parametrize("world_size", [2, 5])
def test_models_in_turns_give_the_same_bits(wide_checkpoint: Path, osp_checkpoint: Path, world_size: int) -> None:  # noqa: F811
    assert run_ranks(same_bits, world_size, str(wide_checkpoint), str(osp_checkpoint), timeout=120) == [4] * world_size


def resume_elsewhere(parallel: GroupParallel, state: Any) -> None:
    """The layout, but not by which pattern the tokens lie."""
    parallel._current = state[0]


def forget_modulation(runtime: Runtime, path: str) -> float:
    """The twin: an evaluation goes on with the shifts and scales of the other prompt."""
    config = load_config(
        {
            "model": {"weights": path},
            "groups": {"dit_ranks": 2},
            "attention": {"ping_pong": "on"},
            "memory": {"precompute_modulation": True},
        }
    )
    found = []
    for forgets in (False, True):
        denoiser = HunyuanVideoDenoiser(Checkpoint(path), config, runtime)
        assert denoiser._modulation is not None
        if forgets:
            denoiser._modulation.resume = lambda state: None  # type: ignore[method-assign]
        found.append(finish(start_hunyuan(denoiser, GUIDED)))
    leave(runtime)
    return relative(found[1], found[0])


def forget_groups(runtime: Runtime, path: str) -> None:
    """The twin: an evaluation takes its tokens to lie as those of the other one do."""
    denoiser = osp_denoiser(path, runtime, ping_pong="on")
    assert denoiser._parallel is not None
    denoiser._parallel.resume = partial(resume_elsewhere, denoiser._parallel)  # type: ignore[method-assign]
    finish(start_osp(denoiser))


def test_what_a_model_holds_for_an_evaluation_must_be_given_back(tiny_checkpoint: Path, osp_checkpoint: Path) -> None:  # noqa: F811
    assert min(run_ranks(forget_modulation, 2, str(tiny_checkpoint))) > 1e-3
    with pytest.raises(RanksError, match="size of tensor"):
        run_ranks(forget_groups, 2, str(osp_checkpoint))


# -- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["groups.dit_ranks=4", "attention.cfg_parallel=on"], "attention.cfg_parallel='on' gives each half"),
        (["groups.dit_ranks=4", "attention.strategy=xfuser"], "attention.strategy='xfuser' waits for each"),
        (["groups.dit_ranks=1"], "groups.dit_ranks=1 and no helpers"),
    ],
)
def test_turns_that_nothing_is_gained_by_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"attention.ping_pong='on' has nothing to do .*{message}.*nearest is 'off'"):
        load_config(None, ["attention.ping_pong=on", *overrides])
    load_config(None, ["attention.ping_pong=on", "groups.dit_ranks=1", "attention.co_processing=on"])


def test_a_single_rank_of_the_same_configuration_takes_no_turns() -> None:
    config = load_config(None, ["groups.dit_ranks=2", "attention.ping_pong=on"])
    assert with_layout(config, RankLayout(3, 1), "npy").attention.ping_pong == "on"
    assert with_layout(config, RankLayout(1, 1), "npy").attention.ping_pong == "off"
