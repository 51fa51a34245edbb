"""Calibration on real ranks: all come to the same choice, it is kept on disk, and whatever is chosen gives the clip."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.attention import SequenceParallel
from dit_group.calibrate import calibrate
from dit_group.kernels import sdpa
from dit_group.ulysses import Ulysses
from pipelines import HunyuanVideoPipeline, OpenSoraPlanPipeline, cli
from pipelines.calibration import Calibrations, rules_of, shape_of
from pipelines.calibration_cache import CalibrationCache, setup_of
from pipelines.checkpoint import Checkpoint
from pipelines.families import ModelFacts, load_family
from pipelines.hunyuan_video import HunyuanVideo
from pipelines.launch import LocalLauncher
from tests.ranks import leave, run_ranks
from tests.test_sharded_dit import relative
from tools.tiny_open_sora_plan import make_open_sora_plan
from videopipe.arrangement import (
    Arrangement,
    Calibration,
    Guidance,
    Rules,
    Shape,
    Timing,
    ways_with_helpers,
    ways_without_helpers,
)
from videopipe.config import Config, ConfigError, load_config
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime, device_name

SPEC = VideoSpec(height=64, width=48, num_frames=17)
AUTO = {"heads_per_chunk": "auto", "balance": "auto", "co_processing": "auto"}

# -- the measurement, on layers that sleep: time without noise, on real groups


@dataclass
class SleepyPart:
    """A layer whose kernel takes so long for each head and does nothing else; a DiT rank's, or a helper's."""

    parallel: SequenceParallel
    seconds_per_head: float
    leads: bool
    per_call_s: float = 0.0
    projection_s: float = 0.0

    halves: tuple[SequenceParallel, ...] = ()  # that this rank is in, or helps
    branches_as_rows = False

    def views(self, guidance: Guidance) -> tuple[SequenceParallel, ...]:
        return self.halves if guidance == "halves" else (self.parallel,)

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        return ((0, 3),) if self.leads else ()

    def layer(self, index: int, shape: Shape) -> Callable[[], object]:
        tokens = self.parallel.sequence.counts[self.parallel.member] if self.leads else 0
        x = torch.zeros(shape.rows, tokens, self.parallel.num_heads, 4)

        def run() -> Tensor:
            call = self.parallel.begin(self._kernel)
            for send in (call.value, call.key, call.query):
                time.sleep(self.projection_s if self.leads else 0)
                send(x)
            call.attend()
            return call.output()

        return run

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        time.sleep(self.per_call_s + self.seconds_per_head * q.shape[2] * q.shape[1] / k.shape[1])
        return sdpa(q, k, v, key_mask)


def measure(
    runtime: Runtime, num_heads: int, member_s: float, helper_s: tuple[float, ...], projection_s: float
) -> list[Any]:
    """The calibration of sleepy ranks, as JSON; the DiT ranks come first, then one helper for each of `helper_s`."""
    members = runtime.world_size - len(helper_s)
    helpers = tuple(range(members, runtime.world_size))
    sets = [(helper,) for helper in helpers] + ([helpers] if len(helpers) > 1 else [])
    groups = {}
    for lent in sets:
        ranks = [*range(members), *lent]
        group = dist.new_group(ranks)
        if runtime.rank in ranks:
            groups[lent] = group
    runtime = replace(runtime, assist_groups=groups)
    parallel = SequenceParallel(
        group=runtime.exchange_group,
        member=runtime.dit_member,
        members=members,
        num_heads=num_heads,
        rank=runtime.rank,
        assist_groups=groups,
    )
    seconds = member_s if runtime.dit_member is not None else helper_s[runtime.rank - members]
    rules = Rules(
        num_heads=num_heads, members=members, choose_chunks=True, balance=None, helper_sets=tuple(sets),
        choose_helpers=True,
    )  # fmt: skip
    part = SleepyPart(parallel, seconds, leads=runtime.dit_member is not None, projection_s=projection_s)
    found = calibrate(part, runtime, Shape(num_video=40, num_text=4), rules, budget_s=6.0)
    leave(runtime)
    return msgspec.to_builtins(found)  # type: ignore[no-any-return]


def measured(
    num_heads: int, members: int, member_s: float, helper_s: tuple[float, ...], projection_s: float = 0.0
) -> Calibration:
    world_size, dit_ranks = members + len(helper_s), tuple(range(members))
    answers = run_ranks(
        measure, world_size, num_heads, member_s, helper_s, projection_s, dit_ranks=dit_ranks, timeout=120
    )
    assert all(answer["chosen"] == answers[0]["chosen"] for answer in answers)  # the same on all ranks,
    assert all(answer["timings"] == answers[0]["timings"] for answer in answers)  # since all see the same times
    return msgspec.convert(answers[0], Calibration)


def test_a_quick_helper_is_lent_and_gets_its_share() -> None:
    found = measured(4, 2, 0.040, (0.004,))
    assert found.chosen[0].helpers == () and found.chosen[-1].helpers == (2,)
    counts = found.chosen[-1].head_counts
    assert counts is not None and counts[2] >= 3
    plain = found.timings[0]
    assert plain.arrangement == Arrangement() and plain.ratios == (1.0,) * len(plain.ratios)
    assert plain.attention_s is not None and plain.attention_s >= 0.080  # 2 of 4 heads
    best = next(timing for timing in found.timings if timing.arrangement == found.chosen[-1])
    assert best.ratio < 0.9 and best.assist_s is not None and best.assist_s >= 0.004 * counts[2]


def test_a_slow_helper_is_not_lent() -> None:
    found = measured(4, 2, 0.020, (0.2, 0.002))
    assert [way.helpers for way in found.chosen] == [(), (3,)]  # a head of rank 2 takes longer than the whole layer


def test_leftover_heads_are_divided_where_that_is_faster() -> None:
    found = measured(3, 2, 0.060, ())
    assert found.chosen[0].balance == "rows"  # 1.5 heads each in place of 2 and 1


def measure_guided(runtime: Runtime, guidance: Guidance, member_s: float, helper_s: float, projection_s: float) -> Any:
    """Two sleepy DiT ranks and a helper of 6 heads, which evaluate two branches."""
    me, halves = runtime.rank, []
    common: dict[str, Any] = {"num_heads": 6, "rank": me}
    everybody = {(2,): dist.new_group([0, 1, 2])}
    parallel = SequenceParallel(
        group=runtime.exchange_group, member=runtime.dit_member, members=2, assist_groups=everybody, **common
    )
    for rank in (0, 1):
        group = dist.new_group([rank, 2])
        if me in (rank, 2):
            member = 0 if me == rank else None
            halves.append(SequenceParallel(group=None, member=member, members=1, assist_groups={(2,): group}, **common))
    seconds = helper_s if me == 2 else member_s
    part = SleepyPart(parallel, seconds, leads=me != 2, projection_s=projection_s, halves=tuple(halves))
    rules = Rules(
        num_heads=6, members=1 if guidance == "halves" else 2, helper_sets=((2,),), choose_helpers=True,
        in_turns=None if guidance == "pair" else False,
    )  # fmt: skip
    shape = Shape(num_video=40, num_text=4, guidance=guidance)
    found = calibrate(part, replace(runtime, assist_groups=everybody), shape, rules, budget_s=5.0)
    leave(runtime)
    return msgspec.to_builtins(found)


def guided_times(guidance: Guidance, member_s: float, helper_s: float, projection_s: float) -> Calibration:
    arguments = (guidance, member_s, helper_s, projection_s)
    answers = run_ranks(measure_guided, 3, *arguments, dit_ranks=(0, 1), timeout=120)
    assert all(answer == answers[0] for answer in answers[1:])
    return msgspec.convert(answers[0], Calibration)


def test_a_helper_gets_more_heads_where_branches_take_turns() -> None:
    """One after the other each takes 30 + 30 ms, with help 30 + 20; in turns 30 + 10: the helper has 4 of 6 heads."""
    found = guided_times("pair", 0.010, 0.010, 0.010)
    assert found.linear_s >= 2 * 0.030  # of both branches
    in_turns = [timing for timing in found.timings if timing.arrangement.in_turns]
    alone = next(timing.ratio for timing in in_turns if not timing.arrangement.helpers)
    shares = {t.arrangement.head_counts[2]: t.ratio for t in in_turns if t.arrangement.head_counts is not None}
    others = [t.arrangement.head_counts for t in found.timings if t not in in_turns]
    assert max(shares) > 2 == max(counts[2] for counts in others if counts is not None)
    assert shares[max(shares)] < 0.95 * alone, (shares, alone)


def test_a_helper_of_halves_is_judged_by_both_of_them() -> None:
    """A half has 6 heads of 20 ms; a head of both takes the helper 8 ms or 140."""
    quick = guided_times("halves", 0.020, 0.004, 0.0)
    assert quick.chosen[-1].helpers == (2,) and quick.chosen[-1].head_counts is not None
    assert 0.120 <= min(quick.timings[0].layer_s) < 0.240  # both at the same time, with help as well
    helped = next(timing for timing in quick.timings if timing.arrangement == quick.chosen[-1])
    assert helped.ratio < 0.75
    assert [way.helpers for way in guided_times("halves", 0.020, 0.070, 0.0).chosen] == [()]


@pytest.mark.parametrize("projection_s", [0.0, 0.1])
def test_v_and_k_leave_early_as_far_as_projections_hide_them(projection_s: float) -> None:
    """No time passes between the projections, or far more than tensors of this size travel."""
    ways = [timing.arrangement for timing in measured(6, 2, 0.002, (), projection_s).timings]
    in_chunks = [way for way in ways if way.num_chunks(6, 2) > 1]
    assert in_chunks and all(way.early_chunks is None for way in ways if way not in in_chunks)
    for way in in_chunks:
        assert way.early_chunks is not None
        assert (way.early_chunks == way.num_chunks(6, 2)) == (projection_s > 0), way


def test_chunks_are_counted_as_they_are_cut_and_as_many_leave_early() -> None:
    group = cast(dist.ProcessGroup, object())  # nothing is sent
    for num_heads, members, lent in product((3, 8, 24, 26), (2, 3, 4), (0, 1, 2)):
        helpers = tuple(range(members, members + lent))
        rules = Rules(
            num_heads=num_heads, members=members, choose_chunks=True, balance=None, helper_sets=(helpers,),
            choose_helpers=lent != 2,
        )  # fmt: skip
        ways = list(ways_without_helpers(rules))
        if lent:
            ways += ways_with_helpers(rules, Arrangement(heads_per_chunk=2), helpers, 1.0, [0.5] * lent)
        parallel = SequenceParallel(
            group=group, member=0, members=members, num_heads=num_heads, assist_groups={helpers: group}
        )
        for way in ways:
            chunks = way.num_chunks(num_heads, members)
            cuts = ((None, -(-chunks // 2)), (1, 1), (chunks, chunks))
            for early, expected in cuts if chunks else cuts[:1]:  # fewer heads than ranks: all may be divided by rows
                told = msgspec.structs.replace(way, early_chunks=early)
                plan = parallel.lay_out_as(told, 40, 4).attention
                assert isinstance(plan, Ulysses)
                assert len(plan.chunks) == chunks, way
                assert plan.early_parts == expected, told


# -- what is kept


@pytest.fixture(scope="module")
def facts(tiny_checkpoint: Path) -> ModelFacts:
    return HunyuanVideo().facts(Checkpoint(str(tiny_checkpoint), None))


def auto_config(checkpoint: Path, cache: Path, dit_ranks: int = 2, vae_ranks: int = 1, **attention: str) -> Config:
    return load_config(
        {
            "model": {"weights": str(checkpoint)},
            "groups": {"dit_ranks": dit_ranks, "vae_ranks": vae_ranks},
            "attention": AUTO | attention | {"calibration_cache": str(cache)},
            "request": {"height": SPEC.height, "width": SPEC.width, "num_frames": SPEC.num_frames},
            "runtime": {"device": "cpu", "threads_per_rank": 1},
            "output": {"format": "latent"},
        }
    )


def a_calibration(shape: Shape, *chosen: Arrangement) -> Calibration:
    timing = Timing(arrangement=Arrangement(), layer_s=(0.1, 0.2), ratios=(1.0, 1.0), attention_s=0.05)
    return Calibration(shape=shape, linear_s=0.01, timings=(timing,), chosen=chosen or (Arrangement(),), seconds=1.0)


def request(name: str = "clip", spec: VideoSpec = SPEC, steps: int = 4) -> VideoRequest:
    return VideoRequest(id=name, prompt="a red fox", spec=spec, num_inference_steps=steps)


def known(config: Config, facts: ModelFacts, device: str = "a processor") -> Calibrations:
    return Calibrations(config, facts, setup_of(config, facts, [device] * config.world_size, hosts=1))


def test_what_is_stored_comes_back(tiny_checkpoint: Path, facts: ModelFacts, tmp_path: Path) -> None:
    config = auto_config(tiny_checkpoint, tmp_path / "new" / "folder")
    shape = shape_of(config, facts, request())
    assert known(config, facts).to_measure([request(), request("again")]) == [shape]
    assert known(config, facts).choose(request()).source == "not measured"
    lent = Arrangement(helpers=(2,), head_counts=(1, 1, 2), helpers_first=True)
    known(config, facts).take(a_calibration(shape, Arrangement(heads_per_chunk=1), lent))

    again = known(config, facts)
    assert again.get(shape) == a_calibration(shape, Arrangement(heads_per_chunk=1), lent)
    assert again.to_measure([request()]) == []
    choice = again.choose(request())
    assert (choice.source, choice.ways, choice.helper_sets) == (
        "cache",
        (Arrangement(heads_per_chunk=1), lent),
        ((2,),),
    )
    # what was measured elsewhere, or for something else, does not count
    assert known(config, facts, "another processor").get(shape) is None
    other = auto_config(tiny_checkpoint, tmp_path / "new" / "folder", balance="heads")
    assert known(other, facts).get(shape) is None


def test_another_size_takes_the_nearest_one(tiny_checkpoint: Path, facts: ModelFacts, tmp_path: Path) -> None:
    config = auto_config(tiny_checkpoint, tmp_path)
    small = shape_of(config, facts, request())
    large = Shape(num_video=100 * small.num_video, num_text=small.num_text)
    calibrations = known(config, facts)
    calibrations.take(a_calibration(large, Arrangement(heads_per_chunk=2)))
    calibrations.take(a_calibration(small, Arrangement(heads_per_chunk=1)))
    asked = request(spec=VideoSpec(height=64, width=64, num_frames=17))
    choice = known(config, facts).choose(asked)  # from disk
    assert (choice.source, choice.shape, choice.ways[0].heads_per_chunk) == ("nearest", small, 1)
    assert choice.describe()["ways"][0]["text"] == "1 head a chunk"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe", b'{"version": "one"}'])
def test_a_broken_file_is_told_of_and_replaced(
    tiny_checkpoint: Path, facts: ModelFacts, tmp_path: Path, content: bytes
) -> None:
    config = auto_config(tiny_checkpoint, tmp_path)
    shape, calibrations = shape_of(config, facts, request()), known(config, facts)
    cache, setup = CalibrationCache.of(config), setup_of(config, facts, ["a processor"] * 3, hosts=1)
    path = cache.path(setup, shape)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"calibration {path} cannot be read") as told:
        assert calibrations.to_measure([request()]) == [shape]
    assert len(told) == 1
    calibrations.take(a_calibration(shape))
    assert cache.get(setup, shape) == a_calibration(shape)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_for_something_else_does_not_count(tiny_checkpoint: Path, facts: ModelFacts, tmp_path: Path) -> None:
    config = auto_config(tiny_checkpoint, tmp_path)
    shape = shape_of(config, facts, request())
    cache, setup = CalibrationCache.of(config), setup_of(config, facts, ["a processor"] * 3, hosts=1)
    cache.put(setup, a_calibration(shape))
    path = cache.path(setup, shape)
    path.write_bytes(path.read_bytes().replace(b"a processor", b"b processor"))
    with pytest.warns(UserWarning, match="is for something else"):
        assert cache.get(setup, shape) is None
    # another version of torch has files of its own
    assert cache.path(msgspec.structs.replace(setup, torch="0.1"), shape) != path


def test_a_folder_that_cannot_be_written_is_told_of(tiny_checkpoint: Path, facts: ModelFacts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = auto_config(tiny_checkpoint, tmp_path / "file")
    calibrations, shape = known(config, facts), shape_of(config, facts, request())
    with pytest.warns(UserWarning, match=r"calibration is not kept: attention\.calibration_cache="):
        calibrations.take(a_calibration(shape))
    assert calibrations.get(shape) is not None


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CalibrationCache.of(load_config()).folder == tmp_path / "videopipe" / "calibration"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CalibrationCache.of(load_config()).folder == tmp_path / ".cache" / "videopipe" / "calibration"


# -- what the configuration leaves open


def test_deterministic_runs_measure_nothing(facts: ModelFacts) -> None:
    fast = load_config({"groups": {"dit_ranks": 2, "vae_ranks": 2}, "attention": AUTO})
    assert fast.calibrates and len(fast.helper_sets) == 3
    still = load_config(
        {"groups": {"dit_ranks": 2, "vae_ranks": 2}, "attention": AUTO, "schedule": {"mode": "deterministic"}}
    )
    assert not still.calibrates and still.helper_sets == ()
    assert rules_of(still, facts).plain == Arrangement()


@pytest.mark.parametrize(
    ("settings", "calibrates"),
    [
        ([], False),
        (["groups.dit_ranks=1", "attention.heads_per_chunk=auto", "attention.balance=auto"], False),
        (["groups.dit_ranks=1", "attention.co_processing=auto"], True),
        (["groups.vae_ranks=0", "attention.co_processing=auto"], False),
        (["groups.dit_ranks=2", "attention.strategy=ring", "attention.heads_per_chunk=auto"], False),
        (["groups.dit_ranks=2", "attention.strategy=usp", "attention.heads_per_chunk=auto"], True),
        (["groups.dit_ranks=1", "attention.strategy=usp", "attention.co_processing=auto"], False),
    ],
)
def test_only_what_can_be_chosen_is_measured(settings: list[str], calibrates: bool) -> None:
    config = load_config(None, settings)
    assert config.calibrates == calibrates
    if "attention.strategy=usp" in settings:
        assert config.helper_sets == ()


def test_a_wrong_word_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"attention\.heads_per_chunk='automatic' must be one of 'all', 'auto'"):
        load_config(None, ["attention.heads_per_chunk=automatic"])


# -- end to end


def latents(pipe: HunyuanVideoPipeline, count: int = 4) -> tuple[dict[str, Tensor], list[Any]]:
    requests = [
        VideoRequest(
            id=f"clip{i}",
            prompt=f"a red fox number {i}" + " in the snow" * i,
            negative_prompt="blur" if i % 2 else None,
            true_cfg_scale=3.0,
            spec=SPEC,
            num_inference_steps=4,
            seed=i,
        )
        for i in range(count)
    ]
    results = list(pipe.render(requests))
    return {r.request_id: r.latents for r in results}, [r.side_car for r in results]


def equal(found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    for name, clip in found.items():
        error = float((clip - reference[name]).abs().max() / reference[name].abs().max())
        assert error < 1e-5, (name, error)


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, launcher: LocalLauncher) -> dict[str, Tensor]:
    """One rank."""
    overrides = ["output.format=latent", "runtime.threads_per_rank=1"]
    with HunyuanVideoPipeline.from_pretrained(
        tiny_checkpoint, dit_ranks=1, vae_ranks=0, overrides=overrides, launcher=launcher
    ) as pipe:
        return latents(pipe)[0]


@pytest.mark.parametrize(("dit_ranks", "vae_ranks"), [pytest.param(2, 1, marks=pytest.mark.slow), (3, 2)])
def test_everything_automatic_gives_the_same_clips(
    tiny_checkpoint: Path,
    launcher: LocalLauncher,
    alone: dict[str, Tensor],
    tmp_path: Path,
    dit_ranks: int,
    vae_ranks: int,
) -> None:
    config = auto_config(tiny_checkpoint, tmp_path, dit_ranks, vae_ranks)
    stored_apart = msgspec.structs.replace(config.memory, precompute_modulation=dit_ranks == 3)
    config = msgspec.structs.replace(config, memory=stored_apart)
    for source in ("measured", "cache"):
        with HunyuanVideoPipeline.start(config, launcher=launcher) as pipe:
            found, side_cars = latents(pipe)
            spans = [span for span in pipe.trace.spans if span.stage == "calibrate"]
        equal(found, alone)
        assert len(spans) == (config.world_size if source == "measured" else 0)
        for side_car in side_cars:
            chosen = side_car.plan["chosen"]
            assert chosen["source"] == source and not chosen["ways"][0]["helpers"]
    (file,) = tmp_path.iterdir()
    stored = msgspec.json.decode(file.read_bytes())
    plain = stored["calibration"]["timings"][0]
    assert (
        plain["arrangement"]["head_counts"] is None
        and stored["setup"]["devices"] == [device_name(torch.device("cpu"))] * config.world_size
    )


# -- branches of guidance, and groups of tokens


def osp_facts() -> ModelFacts:
    return load_family("open-sora-plan").published.facts


def guided(scale: float = 3.0, spec: VideoSpec = SPEC) -> VideoRequest:
    """With a second branch, in either family."""
    return msgspec.structs.replace(
        request(spec=spec), negative_prompt="blur", true_cfg_scale=scale, guidance_scale=scale
    )


@pytest.mark.parametrize(
    ("overrides", "guidance", "members"),
    [
        (["attention.cfg_parallel=on", "attention.ping_pong=auto"], "halves", 2),
        (["attention.ping_pong=auto"], "pair", 4),
        (["attention.ping_pong=on"], "pair", 4),
        (["attention.ping_pong=auto", "schedule.mode=deterministic"], "none", 4),
        ([], "none", 4),
    ],
)
def test_each_way_of_guidance_has_rules_and_times_of_its_own(
    facts: ModelFacts, overrides: list[str], guidance: str, members: int
) -> None:
    settings = ["groups.dit_ranks=4", "attention.heads_per_chunk=auto", "attention.balance=auto", *overrides]
    config = load_config(None, settings)
    shape = shape_of(config, facts, guided())
    assert (shape.guidance, shape.rows) == (guidance, 1)
    assert shape_of(config, facts, guided(scale=1.0)).guidance == "none"
    rules = rules_of(config, facts, shape.guidance)
    assert (rules.members, rules_of(config, facts).members) == (members, 4)
    in_turns = {way.in_turns for way in ways_without_helpers(rules)}
    if guidance == "pair":
        assert in_turns == ({True} if "attention.ping_pong=on" in overrides else {False, True})
    else:
        assert in_turns == {False}
    assert {way.in_turns for way in ways_without_helpers(rules_of(config, facts))} == {False}


def test_a_measurement_of_another_guidance_is_not_the_nearest(facts: ModelFacts, tmp_path: Path) -> None:
    config = load_config(
        {"groups": {"dit_ranks": 4}, "attention": {**AUTO, "cfg_parallel": "on", "calibration_cache": str(tmp_path)}}
    )
    calibrations = known(config, facts)
    calibrations.take(a_calibration(shape_of(config, facts, guided()), Arrangement(heads_per_chunk=1)))
    assert known(config, facts).choose(guided()).source == "cache"
    assert known(config, facts).choose(request()).source == "not measured"
    larger = guided(spec=VideoSpec(height=64, width=64, num_frames=17))
    assert known(config, facts).choose(larger).source == "nearest"


def test_groups_of_tokens_leave_no_rows_to_choose() -> None:
    config = load_config({"model": {"family": "open-sora-plan"}, "groups": {"dit_ranks": 7}, "attention": AUTO})
    load_family("open-sora-plan").check_config(config)
    rules = rules_of(config, osp_facts())
    assert {way.balance for way in ways_without_helpers(rules)} == {"heads"}
    # two ranks share a group of 24 heads, and 4 heads each are those of a dense block
    assert {way.heads_per_chunk for way in ways_without_helpers(rules)} >= {None, 7, 5, 4, 2, 1}
    lent = ways_with_helpers(rules, Arrangement(), (7,), 1.0, [1.0])
    assert lent and {way.balance for way in lent} == {"heads"}
    assert shape_of(config, osp_facts(), guided()).rows == 2 and shape_of(config, osp_facts(), guided(1.0)).rows == 1


def every_way(config: Config, facts: ModelFacts) -> list[tuple[Arrangement, ...]]:
    """All ways that could be chosen: without helpers, and with each set of them."""
    rules = rules_of(config, facts)
    found: list[tuple[Arrangement, ...]] = [(way,) for way in ways_without_helpers(rules)]
    for helpers in rules.helper_sets:
        for way in ways_with_helpers(rules, Arrangement(heads_per_chunk=1), helpers, 1.0, [0.5] * len(helpers)):
            found.append((Arrangement(), way))
    return found


@pytest.mark.parametrize(("dit_ranks", "vae_ranks"), [(2, 1), (3, 2)])
def test_every_choice_gives_the_same_clips(
    tiny_checkpoint: Path,
    launcher: LocalLauncher,
    alone: dict[str, Tensor],
    facts: ModelFacts,
    tmp_path: Path,
    dit_ranks: int,
    vae_ranks: int,
) -> None:
    """One pipeline, told each choice in turn as if it had been measured."""
    config = auto_config(tiny_checkpoint, tmp_path, dit_ranks, vae_ranks)
    shape = shape_of(config, facts, request())
    choices = every_way(config, facts)
    assert {way.balance for ways in choices for way in ways} == {"heads", "rows"}
    assert any(way.helpers_first for ways in choices for way in ways)
    lent: set[tuple[int, ...]] = set()
    with HunyuanVideoPipeline.start(config, launcher=launcher) as pipe:
        measuring = pipe.engine._measuring
        assert measuring is not None
        for ways in choices:
            measuring.calibrations.take(a_calibration(shape, *ways))
            found, side_cars = latents(pipe, count=1)
            equal(found, alone)
            assert [way["helpers"] for way in side_cars[0].plan["chosen"]["ways"]] == [way.helpers for way in ways]
            steps = [s for s in pipe.trace.spans if s.stage == "assist" and s.request == "clip0"]
            pipe.trace.spans.clear()
            assert {span.rank for span in steps} == set(ways[-1].helpers)  # lent in all steps, and nobody else
            lent.add(ways[-1].helpers)
    assert lent == {(), *config.helper_sets}


def test_a_new_size_is_measured_when_idle_and_else_takes_the_nearest(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    other = VideoSpec(height=64, width=64, num_frames=17)
    with HunyuanVideoPipeline.start(auto_config(tiny_checkpoint, tmp_path), launcher=launcher) as pipe:
        both = pipe.render([request("first"), request("long", steps=100)])
        first = next(both)  # the other goes on meanwhile
        [second] = pipe.render([request("second", other)])
        assert len(list(both)) == 1
        [third] = pipe.render([request("third", other)])
        spans = sorted((s.start_ns, s.end_ns) for s in pipe.trace.spans if s.stage == "calibrate" and s.rank == 2)
        work = sorted((s.start_ns, s.end_ns) for s in pipe.trace.spans if s.rank == 2 and s.stage != "start")
    sources = [clip.side_car.plan["chosen"]["source"] for clip in (first, second, third)]
    assert sources == ["measured", "nearest", "measured"]
    assert len(spans) == 2 and all(a[1] <= b[0] for a, b in pairwise(work))  # never while it does something else


def test_one_submission_may_have_several_new_sizes(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    specs = [VideoSpec(height=64, width=48 + 16 * i, num_frames=5) for i in range(4)]
    with HunyuanVideoPipeline.start(auto_config(tiny_checkpoint, tmp_path), launcher=launcher) as pipe:
        results = {r.request_id: r for r in pipe.render([request(f"c{i}", spec) for i, spec in enumerate(specs)])}
    sources = [results[f"c{i}"].side_car.plan["chosen"]["source"] for i in range(4)]
    assert sources == ["measured", "measured", "measured", "nearest"]


def test_a_rank_lost_while_measuring_is_told_to_who_waits(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    from pipelines.faults import RankError

    with HunyuanVideoPipeline.start(auto_config(tiny_checkpoint, tmp_path), launcher=launcher) as pipe:
        measuring = pipe.engine._measuring
        assert measuring is not None
        rules = msgspec.structs.replace(measuring.calibrations.rules("none"), helper_sets=((9,),))
        measuring.calibrations.rules = lambda guidance: rules  # type: ignore[method-assign]
        with pytest.raises(RankError):
            list(pipe.render([request()]))
        with pytest.raises(RankError):
            pipe.engine.calibrate(request())
    assert not list(tmp_path.iterdir())


def test_explain_measures_and_remembers(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from videopipe.config import to_toml

    path = tmp_path / "auto.toml"
    path.write_text(to_toml(auto_config(tiny_checkpoint, tmp_path / "cache")))
    assert cli.run(["explain", str(path)]) == 0
    assert "none are stored for this size" in capsys.readouterr().out
    assert cli.run(["explain", str(path), "--calibrate"]) == 0
    text = capsys.readouterr().out
    assert "of 60 video and 256 text tokens" in text and "a layer without attention and exchange" in text
    table = text[text.index("way ") :].splitlines()
    for column in ("attention", "exchange", "assist", "layer", "to plain", "p10-p90"):
        assert column in table[0]
    assert table[1].startswith("all heads at once") and " 1.00 " in table[1]
    assert any("helps with" in line for line in table)
    assert "chosen        " in text and "lent          " in text
    assert cli.run(["explain", str(path)]) == 0
    assert capsys.readouterr().out == text  # kept
    assert cli.run(["explain", str(path), "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out)
    assert found["choice"]["source"] == "cache" and found["calibration"]["timings"][0]["ratios"][0] == 1.0


def test_explain_refuses_to_measure_what_is_given(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"--model={tiny_checkpoint}"
    assert cli.run(["explain", "hunyuan_tiny_cpu_2p1", model, "--calibrate"]) == 2
    assert "nearest is --set attention.heads_per_chunk=auto" in capsys.readouterr().err
    assert cli.run(["explain", "hunyuan_tiny_cpu_2p1", model]) == 0
    assert "how heads travel" not in capsys.readouterr().out


def test_nothing_is_told_twice(tiny_checkpoint: Path, facts: ModelFacts, tmp_path: Path) -> None:
    """An empty folder is no mistake."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrations = known(auto_config(tiny_checkpoint, tmp_path / "none"), facts)
        assert calibrations.choose(request()).source == "not measured"


# -- guided clips of both families, on halves, in turns and as rows of a batch

PIPELINES = {"hunyuan-video": HunyuanVideoPipeline, "open-sora-plan": OpenSoraPlanPipeline}


def guided_config(checkpoints: dict[str, Path], family: str, cache: Path, *settings: str) -> Config:
    config = auto_config(checkpoints[family], cache)
    plain = {key: value for key, value in msgspec.to_builtins(config.request).items() if value is not None}
    tables = msgspec.to_builtins(config)
    source = {
        "model": {"weights": str(checkpoints[family]), "family": family},
        "groups": tables["groups"],
        "attention": AUTO | {"calibration_cache": str(cache)},
        "request": plain,
        "runtime": {"device": "cpu", "threads_per_rank": 1},
        "output": {"format": "latent"},
    }
    return load_config(source, settings)


def guided_clip(family: str) -> VideoRequest:
    clip = msgspec.structs.replace(guided(), num_inference_steps=2, max_sequence_length=160)
    return clip if family == "hunyuan-video" else msgspec.structs.replace(clip, true_cfg_scale=1.0)


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    osp = make_open_sora_plan(tmp_path_factory.mktemp("osp") / "tiny", num_layers=4)
    return {"hunyuan-video": tiny_checkpoint, "open-sora-plan": osp}


@pytest.fixture(scope="module")
def guided_alone(checkpoints: dict[str, Path], launcher: LocalLauncher) -> dict[str, Tensor]:
    """By one rank."""
    found = {}
    for family, kind in PIPELINES.items():
        overrides = ["output.format=latent", "runtime.threads_per_rank=1"]
        with kind.from_pretrained(
            checkpoints[family], dit_ranks=1, vae_ranks=0, overrides=overrides, launcher=launcher
        ) as pipe:
            [clip] = pipe.render([guided_clip(family)])
            found[family] = clip.latents
    return found


@pytest.mark.parametrize("family", sorted(PIPELINES))
@pytest.mark.parametrize(
    ("setting", "guidance"),
    [
        ("attention.cfg_parallel=on", "halves"),
        ("attention.ping_pong=auto", "pair"),
        ("attention.ping_pong=off", "none"),
    ],
)
def test_whatever_is_chosen_for_guided_clips_gives_those_of_one_rank(
    checkpoints: dict[str, Path],
    launcher: LocalLauncher,
    guided_alone: dict[str, Tensor],
    tmp_path: Path,
    family: str,
    setting: str,
    guidance: Guidance,
) -> None:
    """First what a short measurement chooses, then one way of each kind, told as if it had been measured."""
    config = guided_config(checkpoints, family, tmp_path, setting)
    clip = guided_clip(family)
    with PIPELINES[family].start(config, launcher=launcher) as pipe:
        shape = shape_of(config, pipe.facts, clip)
        assert shape.guidance == guidance
        rules = rules_of(config, pipe.facts, guidance)
        calibration = pipe.engine.calibrate(clip, 0.5)
        assert calibration.shape == shape and calibration.timings[0].arrangement == rules.plain
        assert all(t.attention_s for t in calibration.timings if not t.arrangement.helpers)
        lent = ways_with_helpers(rules, Arrangement(heads_per_chunk=1), (2,), 1.0, [0.7], 0.5)
        helped = [way for way in lent if way.helpers_first][:1] + [way for way in lent if way.in_turns][:1]
        alone = {(way.heads_per_chunk is None, way.in_turns): way for way in ways_without_helpers(rules)}.values()
        assert any(way.in_turns for way in (*alone, *helped)) == (guidance == "pair")
        choices = [calibration.chosen, *((way,) for way in alone), *((rules.plain, way) for way in helped)]
        measuring = pipe.engine._measuring
        assert measuring is not None and len(choices) >= 3 - (guidance == "halves")
        for ways in choices:
            measuring.calibrations.take(a_calibration(shape, *ways))
            [found] = pipe.render([clip])
            assert relative(found.latents, guided_alone[family]) <= 1e-5, ways
            assert [way["helpers"] for way in found.side_car.plan["chosen"]["ways"]] == [way.helpers for way in ways]
            assert found.side_car.plan["chosen"]["shape"]["guidance"] == guidance
        [plain] = pipe.render([msgspec.structs.replace(clip, id="plain", guidance_scale=1.0, true_cfg_scale=1.0)])
    assert plain.side_car.plan["chosen"]["shape"]["guidance"] == "none"
