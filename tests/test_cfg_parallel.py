"""Two halves of the DiT group evaluate one branch of guidance each: the same clips as in one process."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diffusers import HunyuanVideoPipeline as DiffusersPipeline
from torch import Tensor

import pipelines.hunyuan_video_parts
import pipelines.open_sora_plan_parts
from dit_group.denoise import Denoising, draw_noise
from dit_group.shards import exchange_branches
from pipelines import HunyuanVideoPipeline, OpenSoraPlanPipeline
from pipelines.checkpoint import Checkpoint
from pipelines.explain import Explanation, explain_config
from pipelines.hunyuan_video_parts import HunyuanVideoDenoiser
from pipelines.launch import LocalLauncher
from pipelines.noise_floor import RankLayout, with_layout
from pipelines.open_sora_plan_parts import OpenSoraPlanDenoiser
from pipelines.skip_sparse_layout import held_patterns, held_tokens, sent_values
from tests.ranks import leave, run_ranks
from tests.test_sharded_dit import CASES, Arrays, by_diffusers, conditioning_of, relative, request_of
from tests.test_shards import OSP_REQUEST, osp_conditioning, osp_denoiser
from tests.traffic import watched
from tools.tiny_open_sora_plan import make_open_sora_plan
from videopipe.config import ConfigError, load_config
from videopipe.geometry import VideoSpec
from videopipe.partition import JointSequence, Partition, split_evenly
from videopipe.quality.trace import trace
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime, start_branches

TOLERANCE = 1e-5
HEADS = 4
GUIDED = "two branches of different length"
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"text": "padded", "heads_per_chunk": 1},
    {"heads_per_chunk": 2, "balance": "rows", "overlap_mlp": False},
    {"strategy": "ring"},
    {"strategy": "usp", "ulysses_degree": 1},
    {"strategy": "usp", "mesh_inside": "ring"},
)


def halved(runtime: Runtime) -> Runtime:
    """The same rank with groups for two halves."""
    branches = start_branches(rank=runtime.rank, dit_ranks=runtime.dit_ranks, device=runtime.device)
    return dataclasses.replace(runtime, branches=branches)


def hunyuan(path: str, runtime: Runtime, **attention: Any) -> HunyuanVideoDenoiser:
    config = load_config(
        {
            "model": {"weights": path},
            "groups": {"dit_ranks": len(runtime.dit_ranks)},
            "attention": {"cfg_parallel": "on", **attention},
        }
    )
    return HunyuanVideoDenoiser(Checkpoint(path), config, runtime)


def start_hunyuan(denoiser: HunyuanVideoDenoiser, name: str) -> Denoising:
    request = request_of(CASES[name])
    noise = draw_noise(denoiser.latent_shape(request), request.seed)
    return denoiser.begin(request, conditioning_of(CASES[name]), noise)


def start_osp(denoiser: OpenSoraPlanDenoiser, rows: int = 2) -> Denoising:
    request = OSP_REQUEST if rows == 2 else msgspec.structs.replace(OSP_REQUEST, guidance_scale=1.0)
    noise = draw_noise(denoiser.latent_shape(request), request.seed)
    return denoiser.begin(request, osp_conditioning(rows), noise)


def finish(run: Denoising) -> Tensor:
    for step in range(run.next_step, run.num_steps):
        run.step(step)
    return run.latents()


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> Arrays:
    pipe = DiffusersPipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return {name: by_diffusers(pipe, CASES[name]).numpy() for name in (GUIDED, "odd sizes")}


@pytest.fixture(scope="module")
def osp_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_open_sora_plan(tmp_path_factory.mktemp("osp") / "tiny", num_layers=4)


ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dit_ranks=(0,))


@pytest.fixture(scope="module")
def osp_expected(osp_checkpoint: Path) -> Arrays:
    """With guidance, and without: one row."""
    torch.set_num_threads(1)
    denoiser = osp_denoiser(str(osp_checkpoint), ALONE)
    return {str(rows): finish(start_osp(denoiser, rows)).numpy() for rows in (2, 1)}


# -- HunyuanVideo, whose branches are two evaluations


def render_both(runtime: Runtime, path: str, expected: Arrays) -> dict[str, float]:
    """A request with guidance and one without, their steps in turn."""
    found = {}
    for settings in WAYS:
        denoiser = hunyuan(path, halved(runtime), **settings)
        runs = {name: start_hunyuan(denoiser, name) for name in (GUIDED, "odd sizes")}
        for step in range(2):
            for run in runs.values():
                run.step(step)
        for name, run in runs.items():
            found[f"{name}, {settings}"] = relative(run.latents(), torch.from_numpy(expected[name]))
    leave(runtime)
    return found


@pytest.mark.parametrize("world_size", [2, 6])
def test_branches_on_halves_equal_diffusers_in_one_process(
    tiny_checkpoint: Path, expected: Arrays, world_size: int
) -> None:
    for found in run_ranks(render_both, world_size, str(tiny_checkpoint), expected, timeout=120):
        assert len(found) == 2 * len(WAYS)
        assert max(found.values()) <= TOLERANCE, found


def render_modulated(runtime: Runtime, path: str) -> float:
    """Precomputed modulation: a half computes that of its own branch alone."""
    runtime = halved(runtime)
    plain = hunyuan(path, runtime)
    config = load_config(
        {
            "model": {"weights": path},
            "groups": {"dit_ranks": 2},
            "attention": {"cfg_parallel": "on"},
            "memory": {"precompute_modulation": True},
        }
    )
    kept = HunyuanVideoDenoiser(Checkpoint(path), config, runtime)
    found = relative(finish(start_hunyuan(kept, GUIDED)), finish(start_hunyuan(plain, GUIDED)))
    leave(runtime)
    return found


def test_branches_on_halves_with_precomputed_modulation(tiny_checkpoint: Path) -> None:
    assert max(run_ranks(render_modulated, 2, str(tiny_checkpoint))) <= 1e-6


# -- Open-Sora-Plan, whose branches are two rows of a batch


def render_osp(runtime: Runtime, path: str, expected: Arrays) -> dict[str, float]:
    found = {}
    for settings in ({}, {"heads_per_chunk": 1}):
        denoiser = osp_denoiser(path, halved(runtime), cfg_parallel="on", **settings)
        runs = {rows: start_osp(denoiser, rows) for rows in (2, 1)}
        for step in range(OSP_REQUEST.num_inference_steps):
            for run in runs.values():
                run.step(step)
        for rows, run in runs.items():
            found[f"{rows}, {settings}"] = relative(run.latents(), torch.from_numpy(expected[str(rows)]))
    leave(runtime)
    return found


@pytest.mark.parametrize("world_size", [6, pytest.param(8, marks=pytest.mark.slow)])
def test_rows_on_halves_equal_one_process(osp_checkpoint: Path, osp_expected: Arrays, world_size: int) -> None:
    for found in run_ranks(render_osp, world_size, str(osp_checkpoint), osp_expected, timeout=120):
        assert len(found) == 4
        assert max(found.values()) <= TOLERANCE, found


def predict_in_double(runtime: Runtime, path: str) -> Any:
    """One prediction of both rows in fp64, by one rank or by halves."""
    alone = runtime.world_size == 1
    denoiser = osp_denoiser(path, runtime if alone else halved(runtime), cfg_parallel="off" if alone else "on")
    denoiser.transformer.double()
    text = denoiser.transformer.encode_text(
        *(osp_conditioning()[name].double() for name in ("prompt_embeds", "prompt_mask"))
    )
    latents = draw_noise(denoiser.latent_shape(OSP_REQUEST), 3).double()
    timestep = torch.tensor(500.0)
    with torch.no_grad():
        if alone:
            return denoiser.transformer(latents.expand(2, -1, -1, -1, -1), timestep, text=text).sample.numpy()
        half, parallel = denoiser._half, denoiser._parallel
        assert half is not None and parallel is not None and half.branch is not None
        layout = half.lay_out(45, 0)
        parallel.use(layout)
        rows = text.select(slice(half.branch.index, half.branch.index + 1))
        both = torch.cat(
            exchange_branches(denoiser.transformer(latents, timestep, text=rows).sample, layout, denoiser._geometry)
        )
    leave(runtime)
    return both.numpy()


def test_predictions_in_double_precision(osp_checkpoint: Path) -> None:
    torch.set_num_threads(1)
    truth = torch.from_numpy(predict_in_double(ALONE, str(osp_checkpoint)))
    members = [torch.from_numpy(found) for found in run_ranks(predict_in_double, 4, str(osp_checkpoint))]
    assert torch.equal(members[0], members[2]) and torch.equal(members[1], members[3]), "twins have the same bits"
    assert relative(members[0] + members[1], truth) <= 1e-10  # zero but for own tokens


# -- what travels


def check_bytes(runtime: Runtime, hunyuan_path: str, osp_path: str) -> None:
    me, members, half = runtime.rank, runtime.world_size, runtime.world_size // 2
    halves = [tuple(range(half)), tuple(range(half, members))]
    first, place = me < half, me % half
    pair = (place, half + place)
    for family, video, text, values in (("hunyuan", 30, (11, 4), 16 * 4), ("osp", 45, (0, 0), 8 * 4)):
        denoiser: HunyuanVideoDenoiser | OpenSoraPlanDenoiser
        if family == "hunyuan":
            denoiser = hunyuan(hunyuan_path, halved(runtime))
            run = start_hunyuan(denoiser, GUIDED)
        else:
            denoiser = osp_denoiser(osp_path, halved(runtime), cfg_parallel="on")
            run = start_osp(denoiser)
        layers, width = 4, denoiser.transformer.config.attention_head_dim
        sequence = JointSequence.even(video, text[0 if first else 1], half)
        heads = Partition(sequence.counts, split_evenly(HEADS, half))
        exchanged = layers * (3 * heads.to_heads_bytes(place, 1, width, 4) + heads.to_tokens_bytes(place, 1, width, 4))
        own = sequence.video_counts[place] * values * 4
        if isinstance(denoiser, OpenSoraPlanDenoiser):
            patterns = [block.sparse for block in denoiser.transformer.blocks()]
            sizes = {"ranks": half, "member": place, "heads": HEADS, "head_dim": width, "out_values": values}
            exchanged = 4 * sent_values(patterns, video, **sizes)
            own = held_tokens(held_patterns(patterns)[0], video, half).totals[place] * values * 4
        for step in range(run.num_steps):
            with watched() as traffic:
                run.step(step)
            assert traffic.sent(*halves[0 if first else 1]) == exchanged, (family, traffic)
            assert [size for ranks, size in traffic.exchanges if ranks == pair] == [own], (family, traffic)
            assert traffic.sent() == exchanged + own and traffic.calls == []
        with watched() as traffic:
            run.latents()
        assert traffic.exchanges == [(halves[0 if first else 1], own * (half - 1))] and traffic.calls == []
    leave(runtime)


def test_a_step_exchanges_own_tokens_with_the_twin_and_no_more(tiny_checkpoint: Path, osp_checkpoint: Path) -> None:
    run_ranks(check_bytes, 4, str(tiny_checkpoint), str(osp_checkpoint))


# -- twins: mistakes


def render_mistakes(runtime: Runtime, hunyuan_path: str, osp_path: str) -> dict[str, Any]:
    def swapped(prediction: Tensor, layout: Any, geometry: Any) -> tuple[Tensor, ...]:
        return exchange_branches(prediction, layout, geometry)[::-1]

    def alone(prediction: Tensor, layout: Any, geometry: Any) -> tuple[Tensor, ...]:
        exchange_branches(prediction, layout, geometry)
        return prediction, prediction

    def stale(prediction: Tensor, layout: Any, geometry: Any) -> tuple[Tensor, ...]:
        """What the twin predicted comes from another member's tokens."""
        own, other = exchange_branches(prediction, layout, geometry)
        return own, other.roll(2, 4)

    runtime, found = halved(runtime), {}
    for way, twin in (("right", exchange_branches), ("swapped", swapped), ("alone", alone), ("stale", stale)):
        with pytest.MonkeyPatch.context() as patch:
            for module in (pipelines.hunyuan_video_parts, pipelines.open_sora_plan_parts):
                patch.setattr(module, "exchange_branches", twin)
            found[f"hunyuan {way}"] = finish(start_hunyuan(hunyuan(hunyuan_path, runtime), GUIDED)).numpy()
            found[f"osp {way}"] = finish(start_osp(osp_denoiser(osp_path, runtime, cfg_parallel="on"))).numpy()
    leave(runtime)
    return found


def test_mistakes_are_far_from_one_process(
    tiny_checkpoint: Path, osp_checkpoint: Path, expected: Arrays, osp_expected: Arrays
) -> None:
    ranks = run_ranks(render_mistakes, 4, str(tiny_checkpoint), str(osp_checkpoint))
    truth = {"hunyuan": torch.from_numpy(expected[GUIDED]), "osp": torch.from_numpy(osp_expected["2"])}
    for found in ranks:
        errors = {way: relative(torch.from_numpy(x), truth[way.split()[0]]) for way, x in found.items()}
        right = {way: errors.pop(way) for way in ("hunyuan right", "osp right")}
        assert max(right.values()) <= TOLERANCE, right
        assert min(errors.values()) > 100 * TOLERANCE, errors


# -- through the engine and real processes

SIZE = {"height": 64, "width": 48, "num_frames": 9}
FOX = VideoRequest(id="fox", prompt="a red fox", spec=VideoSpec(**SIZE), num_inference_steps=2, seed=5)
BOAT = VideoRequest(
    id="boat",
    prompt="a small blue boat",
    negative_prompt="gray",
    true_cfg_scale=3.0,
    spec=VideoSpec(**SIZE),
    num_inference_steps=4,
    seed=6,
)
BATCH = [BOAT, FOX, msgspec.structs.replace(BOAT, id="other", seed=7)]
OSP_BATCH = [
    VideoRequest(
        id=f"clip{scale}",
        prompt="a red fox",
        spec=VideoSpec(**SIZE),
        num_inference_steps=4,
        guidance_scale=scale,
        seed=5,
        max_sequence_length=160,
    )
    for scale in (7.5, 1.0)
]


FAMILIES = {"hunyuan": HunyuanVideoPipeline, "osp": OpenSoraPlanPipeline}


def start(
    family: str, checkpoint: Path, launcher: LocalLauncher, dit: int, vae: int, *settings: str
) -> HunyuanVideoPipeline | OpenSoraPlanPipeline:
    overrides = ["runtime.threads_per_rank=1", "output.format=latent", *settings]
    if family == "osp":
        overrides.append("model.family=open-sora-plan")
    return FAMILIES[family].from_pretrained(
        checkpoint, overrides=overrides, dit_ranks=dit, vae_ranks=vae, launcher=launcher
    )


def batch_of(family: str) -> list[VideoRequest]:
    return BATCH if family == "hunyuan" else OSP_BATCH


def render(
    pipe: HunyuanVideoPipeline | OpenSoraPlanPipeline, family: str, folder: Path | None = None
) -> dict[str, Tensor]:
    """Latents of a batch with and without guidance."""
    return {result.request_id: result.latents for result in pipe.render(batch_of(family), record_to=folder)}


def frames(pipe: HunyuanVideoPipeline | OpenSoraPlanPipeline, family: str) -> Tensor:
    """Float frames of the family's first request, which has guidance."""
    r = batch_of(family)[0]
    return torch.as_tensor(
        pipe(
            r.prompt,
            negative_prompt=r.negative_prompt,
            **SIZE,
            num_inference_steps=r.num_inference_steps,
            guidance_scale=r.guidance_scale,
            true_cfg_scale=r.true_cfg_scale,
            seed=r.seed,
            max_sequence_length=r.max_sequence_length,
            output_type="np",
        ).frames
    )


RECORDING = "output.record_blocks=2"
IN_TURNS = "attention.ping_pong=on"  # on the whole group, in place of two halves
InOneProcess = dict[str, tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def in_one_process(
    tiny_checkpoint: Path, osp_checkpoint: Path, launcher: LocalLauncher, tmp_path_factory: pytest.TempPathFactory
) -> InOneProcess:
    """By family: the folder with recorded steps; latents of the batch, and frames of its first request."""
    found = {}
    for family, checkpoint in (("hunyuan", tiny_checkpoint), ("osp", osp_checkpoint)):
        folder = tmp_path_factory.mktemp(family)
        with start(family, checkpoint, launcher, 1, 0, RECORDING) as pipe:
            latents = render(pipe, family, folder)
        with start(family, checkpoint, launcher, 1, 0) as pipe:
            found[family] = (folder, {**latents, "frames": frames(pipe, family)})
    return found


@pytest.mark.parametrize("family", ["hunyuan", "osp"])
@pytest.mark.parametrize(
    ("dit", "vae", "settings"),
    [
        (2, 1, ()),
        (4, 1, (RECORDING,)),
        (4, 0, ("attention.heads_per_chunk=1",)),
        (2, 1, ("attention.co_processing=on",)),
        (4, 2, ("attention.co_processing=on", "attention.heads_per_chunk=1")),
        (3, 0, (IN_TURNS,)),
        (1, 2, (IN_TURNS, "attention.co_processing=on", "attention.heads_per_chunk=1")),
        (2, 1, (IN_TURNS, "attention.co_processing=on", RECORDING)),
    ],
)
def test_clips_and_recorded_steps_equal_those_of_one_process(
    request: pytest.FixtureRequest,
    in_one_process: InOneProcess,
    launcher: LocalLauncher,
    tmp_path: Path,
    family: str,
    dit: int,
    vae: int,
    settings: tuple[str, ...],
) -> None:
    checkpoint = request.getfixturevalue("tiny_checkpoint" if family == "hunyuan" else "osp_checkpoint")
    folder, expected = in_one_process[family]
    halves = () if IN_TURNS in settings else ("attention.cfg_parallel=on",)
    with start(family, checkpoint, launcher, dit, vae, *halves, *settings) as pipe:
        found = render(pipe, family, tmp_path if RECORDING in settings else None)
        if RECORDING not in settings:
            found["frames"] = frames(pipe, family)
        stages = {span.stage for span in pipe.trace.spans}
    for name, tensor in found.items():
        assert relative(tensor, expected[name]) <= TOLERANCE, name
        if name == "frames":  # in 0..1
            assert float((tensor - expected[name]).abs().max()) <= TOLERANCE
    assert ("assist" in stages) == ("attention.co_processing=on" in settings)
    for steps in sorted(folder.glob("*.steps")) if RECORDING in settings else ():
        same = trace(steps, tmp_path / steps.name, tolerance=TOLERANCE, trim=True)
        assert same.first is None, (steps.name, str(same.first))
        assert same.compared >= 2 * 4  # fewer tokens in a matrix product may be summed in another order


# -- what is refused, and what is told


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["groups.dit_ranks=7"], r"groups.dit_ranks=7 cannot be halved: .* needs an even number, nearest is 6"),
        (["groups.dit_ranks=1"], r"groups.dit_ranks=1 cannot be halved: .* nearest is 2"),
        (
            ["groups.dit_ranks=6", "attention.strategy=usp", "attention.ulysses_degree=2"],
            r"attention.ulysses_degree=2 must divide the 3 ranks of each half .* nearest is 1",
        ),
        (
            ["groups.dit_ranks=2", "attention.cfg_parallel=yes"],
            r"attention.cfg_parallel='yes' must be one of 'on', 'off'",
        ),
    ],
)
def test_groups_that_cannot_be_halved_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["attention.cfg_parallel=on", *overrides])


def test_another_layout_of_the_same_configuration_runs() -> None:
    config = load_config(
        None,
        [
            "groups.dit_ranks=4",
            "attention.cfg_parallel=on",
            "attention.strategy=usp",
            "attention.ulysses_degree=2",
        ],
    )
    attention = with_layout(config, RankLayout(5, 1), "npy").attention
    assert (attention.cfg_parallel, attention.ulysses_degree) == ("off", 0)
    attention = with_layout(config, RankLayout(2, 1), "npy").attention
    assert (attention.cfg_parallel, attention.ulysses_degree) == ("on", 0)
    assert with_layout(config, RankLayout(8, 1), "npy").attention == config.attention


def explained_both_ways(source: Path | None, *overrides: str) -> tuple[Explanation, Explanation]:
    """What `videopipe explain` says with branches on halves, and on all ranks together."""
    on, off = (
        explain_config(load_config(source, ["runtime.device=cpu", *overrides, f"attention.cfg_parallel={way}"]))
        for way in ("on", "off")
    )
    ways = [sum(r.exchange_bytes_per_step + r.branch_bytes_per_step for r in way.ranks) for way in (on, off)]
    assert [on.clip.step_bytes_otherwise, off.clip.step_bytes_otherwise] == ways[::-1]
    assert (on.clip.halved, off.clip.halved) == (True, False)
    assert (
        "one branch on DiT rank" in on.render_text() and "attention.cfg_parallel='on' would send" in off.render_text()
    )
    return on, off


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_explain_counts_both_ways(ranks: int) -> None:
    """Both branches: 2 * 4 S N D b (n - 1) / n for each layer on all ranks, (m - 1) / m on halves of m."""
    guided = ("request.negative_prompt=gray", "request.true_cfg_scale=3.0", "model.dtype=bfloat16")
    on, off = explained_both_ways(None, *guided, f"groups.dit_ranks={ranks}")
    tensor, half = (on.clip.video_tokens + 256) * 24 * 128 * 2, ranks // 2
    found = [sum(rank.exchange_bytes_per_step for rank in way.ranks) for way in (off, on)]
    assert found == [60 * 8 * tensor * (n - 1) // n for n in (ranks, half)]
    assert sum(rank.branch_bytes_per_step for rank in on.ranks) == 2 * on.clip.video_tokens * 64 * 2


@pytest.mark.parametrize(("ranks", "all_ranks", "halves"), [(2, 21.5, 0), (4, 32.2, 21.5), (8, 83.5, 32.2)])
def test_the_files_of_open_sora_plan_choose_what_sends_less(ranks: int, all_ranks: float, halves: float) -> None:
    """In tensors [1, S, N*D] of one row, see `pipelines.skip_sparse_layout`."""
    file = Path(__file__).parent.parent / "configs" / f"open_sora_plan_{ranks}gpu_80gb.toml"
    on, off = explained_both_ways(file)
    tensor = 2 * 21_120 * 2304 * 2  # of both rows
    for way, units in ((on, halves), (off, all_ranks)):
        sent = sum(rank.exchange_bytes_per_step for rank in way.ranks)
        assert sent / tensor == pytest.approx(units, rel=0.003)  # the table is rounded and leaves predictions out
    assert sum(rank.branch_bytes_per_step for rank in on.ranks) == 2 * 21_120 * 32 * 2
    assert load_config(file).attention.cfg_parallel == "on"


def test_help_goes_on_and_off_for_both_halves(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    batch = [
        msgspec.structs.replace(BOAT if i % 3 else FOX, id=f"clip{i}", seed=i, num_inference_steps=4) for i in range(6)
    ]
    clips, spans = [], []
    for settings in ((), ("attention.cfg_parallel=on", "attention.co_processing=on")):
        overrides = ["runtime.threads_per_rank=1", "output.format=npy", *settings]
        with HunyuanVideoPipeline.from_pretrained(
            tiny_checkpoint, overrides=overrides, dit_ranks=2, vae_ranks=1, launcher=launcher
        ) as pipe:
            clips.append({result.request_id: result.frames.astype(int) for result in pipe.render(batch)})
            spans = pipe.trace.spans
    helped = sum(span.stage == "assist" for span in spans)
    assert 0 < helped < sum(span.stage == "denoise" and span.rank == 0 for span in spans)
    for name, frames_without in clips[0].items():
        assert abs(clips[1][name] - frames_without).max() <= 1, "a value at the edge of two bytes may fall either way"
