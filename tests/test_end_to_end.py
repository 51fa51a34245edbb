"""A prompt through real processes on any group sizes: the same latents and frames as diffusers' own pipeline."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline as DiffusersPipeline

from pipelines import HunyuanVideoPipeline
from pipelines.launch import LocalLauncher
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest

SIZE = {"height": 64, "width": 48, "num_frames": 17}
CALL = {**SIZE, "num_inference_steps": 3}
TOPOLOGIES = [(1, 0), (1, 1), (2, 1), (3, 2), pytest.param((5, 1), marks=pytest.mark.slow), (7, 1), (3, 0)]


def request(index: int, **changes: object) -> VideoRequest:
    fields: dict[str, object] = {
        "id": f"clip{index}",
        "prompt": f"a red fox number {index}",
        "spec": VideoSpec(**SIZE),
        "num_inference_steps": 3,
        "seed": index,
    }
    return VideoRequest(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_checkpoint: Path) -> DiffusersPipeline:
    torch.set_num_threads(1)
    pipeline = DiffusersPipeline.from_pretrained(str(tiny_checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=TOPOLOGIES, ids=lambda t: f"{t[0]}+{t[1]}", scope="module")
def pipeline(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, launcher: LocalLauncher
) -> Iterator[HunyuanVideoPipeline]:
    dit, vae = request.param
    config = {"runtime": {"threads_per_rank": 1}}
    with HunyuanVideoPipeline.from_pretrained(
        tiny_checkpoint, config=config, dit_ranks=dit, vae_ranks=vae, launcher=launcher
    ) as pipe:
        yield pipe


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x - reference).abs().max() / reference.abs().max()).item()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def test_latents_and_frames_equal_diffusers(
    pipeline: HunyuanVideoPipeline, diffusers_pipeline: DiffusersPipeline
) -> None:
    one_rank = pipeline.config.groups.dit_ranks == 1
    for output_type in ("latent", "np"):
        arguments = {"prompt": "a red fox", **CALL, "output_type": output_type}
        ours = torch.as_tensor(pipeline(**arguments, generator=seeded(5)).frames)
        theirs = torch.as_tensor(diffusers_pipeline(**arguments, generator=seeded(5)).frames)
        assert ours.shape == theirs.shape
        if one_rank:
            assert torch.equal(ours, theirs), output_type
        else:
            assert relative_error(ours, theirs) < 1e-5, output_type
        other = torch.as_tensor(pipeline(**arguments, generator=seeded(6)).frames)
        assert relative_error(other, theirs) > 1e-2  # the twin: another seed must not pass


def test_true_cfg_equals_diffusers(pipeline: HunyuanVideoPipeline, diffusers_pipeline: DiffusersPipeline) -> None:
    arguments = {
        "prompt": "a small blue boat on a stormy sea, seen from far above",
        "negative_prompt": "blur",
        "true_cfg_scale": 4.0,
        **CALL,
        "output_type": "latent",
    }
    ours = pipeline(**arguments, generator=seeded(1)).frames
    theirs = diffusers_pipeline(**arguments, generator=seeded(1)).frames
    assert relative_error(ours, theirs) < 1e-5
    without = pipeline(**(arguments | {"true_cfg_scale": 1.0}), generator=seeded(1)).frames
    assert relative_error(without, theirs) > 1e-2  # the twin: the second branch matters


def test_a_prompt_alone_equals_the_same_prompt_in_a_batch(pipeline: HunyuanVideoPipeline) -> None:
    batch = {r.request_id: r for r in pipeline.render([request(i) for i in range(5)])}
    assert sorted(batch) == [f"clip{i}" for i in range(5)]
    alone = next(iter(pipeline.render([request(3)])))
    np.testing.assert_array_equal(alone.frames, batch["clip3"].frames)
    assert not np.array_equal(alone.frames, batch["clip2"].frames)
    frames = alone.frames
    assert frames.dtype == np.uint8 and frames.shape == (17, 64, 48, 3) and frames.std() > 20


def test_leaving_early_cancels_the_rest(pipeline: HunyuanVideoPipeline) -> None:
    results = pipeline.render([request(i, num_inference_steps=8) for i in range(20)])
    first = next(results)
    results.close()
    assert first.frames is not None
    again = [r.request_id for r in pipeline.render([request(100), request(101)])]
    assert sorted(again) == ["clip100", "clip101"]


def test_uint8_frames_equal_diffusers_pil(
    tiny_checkpoint: Path, launcher: LocalLauncher, diffusers_pipeline: DiffusersPipeline
) -> None:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, launcher=launcher) as pipe:
        ours = pipe("a red fox", **CALL, generator=seeded(5)).frames
        theirs = diffusers_pipeline("a red fox", **CALL, generator=seeded(5)).frames
        np.testing.assert_array_equal(np.stack(ours[0]), np.stack(theirs[0]))
        # two prompts and one generator: diffusers draws the noise of both at once
        both = pipe(["a fox", "a boat"], **CALL, generator=seeded(2), output_type="latent").frames
        expected = diffusers_pipeline(["a fox", "a boat"], **CALL, generator=seeded(2), output_type="latent").frames
        assert relative_error(both, expected) < 1e-5


def test_given_embeddings_and_latents_are_used(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, launcher=launcher, dit_ranks=2) as pipe:
        noise = torch.randn(1, 16, 5, 8, 6, generator=seeded(9))
        encoder = DiffusersPipeline.from_pretrained(str(tiny_checkpoint), transformer=None, vae=None)
        embeds, pooled, mask = encoder.encode_prompt("a red fox", device=torch.device("cpu"))
        given = pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            prompt_attention_mask=mask,
            latents=noise,
            **CALL,
            output_type="latent",
        ).frames
        plain = pipe("a red fox", latents=noise, **CALL, output_type="latent").frames
        assert torch.equal(given, plain)
        assert torch.equal(pipe("a red fox", seed=9, **CALL, output_type="latent").frames, plain)  # the same noise
        assert relative_error(pipe("a red fox", seed=8, **CALL, output_type="latent").frames, plain) > 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 60}, "height=60 must be a multiple of 16, nearest is 64"),
        ({"num_frames": 16}, "num_frames=16 must be 1 + k*4, nearest is 17"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1, nearest is 1"),
        ({"output_type": "gif"}, "output_type='gif' must be"),
        ({"latents": torch.zeros(1, 16, 5, 8, 8)}, "latents has shape (1, 16, 5, 8, 8), nearest is (1, 16, 5, 8, 6)"),
        ({"seed": 1, "generator": torch.Generator()}, "seed=1 and generator cannot both be given"),
    ],
)
def test_bad_arguments_name_the_field_and_the_nearest_value(
    shared_pipeline: HunyuanVideoPipeline, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        shared_pipeline("a red fox", **(CALL | arguments))
    assert message in str(error.value)


@pytest.fixture(scope="module")
def shared_pipeline(tiny_checkpoint: Path, launcher: LocalLauncher) -> Iterator[HunyuanVideoPipeline]:
    with HunyuanVideoPipeline.from_pretrained(
        tiny_checkpoint, launcher=launcher, overrides=["groups.text_encoder='vae'", "runtime.threads_per_rank=1"]
    ) as pipe:
        yield pipe


def test_each_rank_loads_only_its_own_parts(shared_pipeline: HunyuanVideoPipeline) -> None:
    weights = shared_pipeline.engine.weight_bytes
    assert set(weights[0]) == {"denoiser"}
    assert set(weights[1]) == {"text_encoder", "decoder"}
    assert all(size > 0 for parts in weights.values() for size in parts.values())


def test_text_encoder_on_the_vae_group_gives_the_same(
    shared_pipeline: HunyuanVideoPipeline, diffusers_pipeline: DiffusersPipeline
) -> None:
    ours = shared_pipeline("a red fox", **CALL, generator=seeded(5), output_type="latent").frames
    theirs = diffusers_pipeline("a red fox", **CALL, generator=seeded(5), output_type="latent").frames
    assert torch.equal(ours, theirs)


def test_decode_of_one_clip_overlaps_denoise_of_the_next(shared_pipeline: HunyuanVideoPipeline) -> None:
    before = len(shared_pipeline.trace.spans)
    # denoising takes longer than decoding, so a decode falls into the denoise of the next clip, not of a later one
    requests = [request(i, num_inference_steps=30) for i in range(6)]
    assert len(list(shared_pipeline.render(requests))) == 6
    spans = shared_pipeline.trace.spans[before:]
    order = [r.id for r in requests]
    overlapping = 0
    for decode in (s for s in spans if s.stage == "decode"):
        following = order[order.index(str(decode.request)) + 1 :][:1]
        overlapping += any(
            s.request in following and s.start_ns < decode.end_ns and decode.start_ns < s.end_ns
            for s in spans
            if s.stage == "denoise"
        )
    assert overlapping >= 3  # five could; a busy machine may lose some
    assert shared_pipeline.trace.overlap("denoise", "decode") > 0


def test_side_car_tells_how_a_clip_was_made(shared_pipeline: HunyuanVideoPipeline, tmp_path: Path) -> None:
    from videopipe import media

    result = next(iter(shared_pipeline.render([request(0)])))
    path = result.save(tmp_path / "fox.mp4")
    assert {p.name for p in tmp_path.iterdir()} == {"fox.mp4", "fox.json"}
    side_car = media.read_side_car(tmp_path / "fox.json")
    assert side_car.request == request(0)
    assert side_car.frames_sha256 == media.frames_hash(result.frames)
    assert {s.stage for s in side_car.stages} >= {"encode", "denoise", "decode"}
    assert {s.rank for s in side_car.stages} == {-1, 0, 1}  # -1: the process that writes the file
    assert side_car.plan["dit_ranks"] == [0] and side_car.plan["vae_ranks"] == [1]
    assert set(side_car.peak_memory_bytes) == {"0", "1"} and min(side_car.peak_memory_bytes.values()) > 1 << 20
    assert side_car.versions["torch"] == torch.__version__.split("+")[0] or side_car.versions["torch"]
    info = media.probe(path)
    assert (info.height, info.width, info.num_frames) == (64, 48, 17)


def test_step_callback_sees_every_step(shared_pipeline: HunyuanVideoPipeline) -> None:
    seen: list[int] = []
    shared_pipeline("a fox", **CALL, callback_on_step_end=lambda pipe, step, timestep, kwargs: seen.append(step))
    assert seen == [0, 1, 2]


def test_same_id_twice_is_refused(shared_pipeline: HunyuanVideoPipeline) -> None:
    with pytest.raises(ValueError, match=r"requests\[1\].id='clip0' is already under way"):
        shared_pipeline.render([request(0), request(0)])


def test_a_slow_caller_holds_the_groups_back(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    overrides = ["queue.capacity=1", "queue.max_undelivered=1", "runtime.threads_per_rank=1"]
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, launcher=launcher, overrides=overrides) as pipe:
        results = pipe.render([request(i, num_inference_steps=1) for i in range(8)])
        next(results)
        threading.Event().wait(2.0)  # the caller works on its clip; the groups must come to rest
        finished = {s.request for s in pipe.trace.spans if s.stage == "finish"}
        # one given out, one in the queue, and one denoised that waits for room
        assert finished == {"clip0", "clip1", "clip2"}
        assert len(list(results)) == 7


def test_a_closed_pipeline_leaves_no_process(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    import psutil

    pipe = HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, launcher=launcher)
    pids = list(pipe.engine.pids.values())
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    pipe.close()
    pipe.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        pipe("a fox", **CALL)
