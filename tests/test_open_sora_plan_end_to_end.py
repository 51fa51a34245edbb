"""Open-Sora-Plan through real processes on any group sizes: the same latents and frames as in one process."""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dit_group.denoise import draw_noise
from pipelines import OpenSoraPlanPipeline
from pipelines.checkpoint import Checkpoint, CheckpointError
from pipelines.explain import explain_config
from pipelines.launch import LocalLauncher
from pipelines.models.open_sora_plan_layout import find_folders
from pipelines.models.skip_sparse import DENSE
from pipelines.open_sora_plan import (
    OpenSoraPlanParts,
    decode_pixels,
    denoise,
    encode_prompt,
    load_parts,
    prompt_rows,
    render_frames,
    text_context,
    trim_text,
)
from pipelines.open_sora_plan_attention import LayerKernel
from pipelines.open_sora_plan_family import OpenSoraPlan
from pipelines.open_sora_plan_parts import OpenSoraPlanDenoiser
from pipelines.side_car import describe_plan
from tests.ranks import run_ranks
from tools.convert_open_sora_plan import convert
from tools.tiny_open_sora_plan import make_open_sora_plan
from videopipe.config import ConfigError, load_config
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime

SPEC = VideoSpec(height=48, width=80, num_frames=9, fps=18.0)  # 45 tokens: no multiple of 16, 2, or 7
PROMPT = "a red fox crossing a fresh river"
STEPS = 3
SCALE = 7.5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_open_sora_plan(tmp_path_factory.mktemp("osp") / "tiny", num_layers=6)


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> OpenSoraPlanParts:
    torch.set_num_threads(1)
    return load_parts(checkpoint)


def request(**changes: object) -> VideoRequest:
    fields: dict[str, Any] = {
        "id": "clip",
        "prompt": PROMPT,
        "spec": SPEC,
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "seed": 5,
        "max_sequence_length": 160,
    }
    return VideoRequest(**(fields | changes))


def start(checkpoint: Path, launcher: LocalLauncher, dit: int, vae: int, *settings: str) -> OpenSoraPlanPipeline:
    overrides = ["model.family=open-sora-plan", "runtime.threads_per_rank=1", *settings]
    return OpenSoraPlanPipeline.from_pretrained(
        checkpoint, overrides=overrides, dit_ranks=dit, vae_ranks=vae, launcher=launcher
    )


def call(pipe: OpenSoraPlanPipeline, output_type: str, **changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "prompt": PROMPT,
        "height": SPEC.height,
        "width": SPEC.width,
        "num_frames": SPEC.num_frames,
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "seed": 5,
        "max_sequence_length": 160,
        "output_type": output_type,
    }
    return torch.as_tensor(pipe(**(arguments | changes)).frames)


@torch.no_grad()
def one_process(parts: OpenSoraPlanParts, seed: int = 5, scale: float = SCALE, negative: str | None = None) -> Any:
    """Latents and float frames of the request by the single-process reference."""
    text = encode_prompt(parts.tokenizer, parts.text_encoder, prompt_rows(PROMPT, negative, scale), 160)
    latents = denoise(
        parts.transformer,
        text_context(parts.transformer, trim_text(text)),
        SPEC,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    return latents, torch.cat(list(decode_pixels(parts.vae, latents)))[None]


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    assert x.shape == reference.shape, (x.shape, reference.shape)
    return ((x - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize(("dit", "vae"), [(1, 0), (1, 1), (2, 1), (3, 1), pytest.param(7, 1, marks=pytest.mark.slow)])
def test_a_clip_equals_that_of_one_process(
    checkpoint: Path, launcher: LocalLauncher, parts: OpenSoraPlanParts, dit: int, vae: int
) -> None:
    latents, frames = one_process(parts)
    with start(checkpoint, launcher, dit, vae) as pipe:
        for output_type, reference in (("latent", latents), ("np", frames)):
            ours = call(pipe, output_type)
            assert error(ours, reference) <= (0 if dit == 1 else 1e-5), output_type
        assert describe_plan(pipe.config, pipe.engine.topology)["text"] == "trimmed"
        assert error(call(pipe, "latent", seed=6), latents) > 1e-2  # the twin: another seed must not pass
        # without guidance the batch has one row; without words against it the clip is another
        assert error(call(pipe, "latent", guidance_scale=1.0), one_process(parts, scale=1.0)[0]) <= 1e-5
        nothing_against = call(pipe, "latent", negative_prompt="")
    assert error(nothing_against, one_process(parts, negative="")[0]) <= 1e-5
    assert error(nothing_against, latents) > 1e-3


def test_files_of_the_batch_equal_rendered_frames(
    checkpoint: Path, launcher: LocalLauncher, parts: OpenSoraPlanParts
) -> None:
    requests = [request(id=f"clip{seed}", seed=seed, guidance_scale=SCALE if seed % 2 else 1.0) for seed in range(4)]
    settings = ("attention.heads_per_chunk=1", "groups.text_encoder=vae", "decode.tiling=true", "attention.text=padded")
    with start(checkpoint, launcher, 2, 1, *settings) as pipe:
        clips = {r.request_id: r.frames for r in pipe.render(requests)}
    for r in requests:
        reference = render_frames(
            parts,
            r.prompt,
            spec=r.spec,
            num_inference_steps=STEPS,
            guidance_scale=r.guidance_scale,
            seed=r.seed,
            max_sequence_length=160,
        )
        assert largest_step(clips[r.id], reference) <= 1  # a value at the edge of two bytes may fall either way
    assert largest_step(clips["clip1"], clips["clip3"]) > 20  # the twin


@pytest.mark.parametrize(("mode", "dit", "vae"), [("stream", 1, 1), ("tiles", 1, 2), ("tiles", 2, 0)])
def test_frames_leave_in_chunks_of_time_and_are_those_of_the_whole_clip(
    checkpoint: Path, launcher: LocalLauncher, mode: str, dit: int, vae: int
) -> None:
    streamed: dict[str, list[NDArray[Any]]] = {}
    firsts: list[int] = []

    def take(clip: str, first_frame: int, frames: NDArray[Any]) -> None:
        firsts.append(first_frame)
        streamed.setdefault(clip, []).append(frames)

    long = msgspec.structs.replace(request(), spec=msgspec.structs.replace(SPEC, num_frames=33))  # chunks of 4 of 9
    with start(checkpoint, launcher, dit, vae) as pipe:
        (whole,) = pipe.render([long])
    with start(checkpoint, launcher, dit, vae, f"decode.mode={mode}") as pipe:
        (result,) = pipe.render([long], on_frames=take)
        (team, *_) = pipe.config.decode_teams
    parts = streamed[long.id]
    assert {s.rank for s in result.side_car.stages if s.stage == "decode"} == set(team)
    assert len(parts) == 3 and firsts == [0, len(parts[0]), len(parts[0]) + len(parts[1])]
    assert np.array_equal(np.concatenate(parts), result.frames)
    assert largest_step(result.frames, whole.frames) <= 1


def largest_step(a: NDArray[Any] | torch.Tensor, b: NDArray[Any] | torch.Tensor) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.mark.parametrize(("dit", "vae"), [(1, 1), (2, 1), (3, 2)])
def test_clips_are_the_same_with_help(
    checkpoint: Path, launcher: LocalLauncher, parts: OpenSoraPlanParts, dit: int, vae: int
) -> None:
    with start(checkpoint, launcher, dit, vae, "attention.co_processing=on") as pipe:
        ours = call(pipe, "latent")
        assert error(call(pipe, "latent", guidance_scale=1.0), one_process(parts, scale=1.0)[0]) <= 1e-5
        stages = {span.stage for span in pipe.trace.spans}
    assert error(ours, one_process(parts)[0]) <= 1e-5
    assert "assist" in stages


def test_the_text_is_projected_once_for_all_steps_of_a_clip(checkpoint: Path) -> None:
    """Keys and values of all cross-attentions; what a step computes of the text would be counted as more."""
    alone = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dit_ranks=(0,))
    weights = {"family": "open-sora-plan", "weights": str(checkpoint)}
    config = load_config({"model": weights, "groups": {"vae_ranks": 0, "text_encoder": "dit"}})
    family = OpenSoraPlan()
    conditioning = family.load_text_encoder(Checkpoint(str(checkpoint)), config, alone).encode(request(), {})
    denoiser = family.load_denoiser(Checkpoint(str(checkpoint)), config, alone)
    assert isinstance(denoiser, OpenSoraPlanDenoiser)
    model, calls = denoiser.transformer, Counter[str]()
    cross = [layer for block in model.blocks() for layer in (block.attn2.to_k, block.attn2.to_v)]
    for name, layers in (("once", [model.caption_projection, *cross]), ("each step", [model.proj_out])):
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, args, name=name: calls.update([name]))
    run = denoiser.begin(request(), conditioning, draw_noise(denoiser.latent_shape(request()), 5))
    for step in range(STEPS):
        run.step(step)
    assert calls == {"once": 1 + 2 * 6, "each step": STEPS}


# -- twins: what would make another clip


def three_ranks(runtime: Runtime, path: str, breakages: list[str]) -> dict[str, NDArray[Any]]:
    """Latents of the request on this rank, once for each way to break the sharded denoiser."""
    config = load_config({"model": {"family": "open-sora-plan", "weights": path}, "groups": {"dit_ranks": 3}})
    checkpoint, family = Checkpoint(path), OpenSoraPlan()
    conditioning = family.load_text_encoder(checkpoint, config, runtime).encode(request(), {})
    found = {}
    for breakage in breakages:
        denoiser = family.load_denoiser(checkpoint, config, runtime)
        assert isinstance(denoiser, OpenSoraPlanDenoiser) and denoiser._parallel is not None
        asked = request()
        noise = draw_noise(denoiser.latent_shape(asked), asked.seed)
        if breakage == "every block is dense":
            kernels = [LayerKernel(pattern=DENSE, held=kernel.held) for kernel in denoiser._parallel.kernels]
            denoiser._parallel.kernels = tuple(kernels)
            for block, kernel in zip(denoiser.transformer.blocks(), kernels, strict=True):
                block.attn1.processor.kernel = kernel
        elif breakage == "tokens stand elsewhere":
            denoiser.transformer.rotary.register_forward_hook(
                lambda module, args, out: [x.flip(0) for x in out], prepend=True
            )
        elif breakage == "a seed for each rank":
            asked = request(seed=5 + runtime.rank)
        elif breakage == "a rank puts its tokens in the place of others":
            denoiser.transformer.proj_out.register_forward_hook(lambda module, args, out: out.roll(15, 1))
        run = denoiser.begin(asked, conditioning, noise)
        for step in range(STEPS):
            run.step(step)
        found[breakage] = run.latents().numpy()
    return found


def test_what_breaks_the_sharding_is_noticed(checkpoint: Path, parts: OpenSoraPlanParts) -> None:
    ways = ["nothing", "every block is dense", "tokens stand elsewhere", "a seed for each rank"]
    ways.append("a rank puts its tokens in the place of others")
    ranks = run_ranks(three_ranks, 3, str(checkpoint), ways)
    reference = one_process(parts)[0]
    for found in ranks:
        errors = {way: error(torch.from_numpy(latents), reference) for way, latents in found.items()}
        assert errors.pop("nothing") <= 1e-5
        assert min(errors.values()) > 1e-3, errors


# -- what is refused, before a rank is started


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": VideoSpec(height=50, width=80, num_frames=9)}, "height=50 must be a multiple of 16, nearest is 48"),
        ({"spec": VideoSpec(height=48, width=80, num_frames=8)}, "num_frames=8 must be 1 + k*4, nearest is 9"),
        ({"num_inference_steps": 300}, "num_inference_steps=300 must be between 1 and 285, nearest is 285"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1, nearest is 1"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale=4 must be 1: the scale of Open-Sora-Plan's guidance is"),
    ],
)
def test_a_request_that_cannot_be_rendered_is_refused(changes: dict[str, object], message: str) -> None:
    family = OpenSoraPlan()
    family.check_request(request(), family.published.facts)
    with pytest.raises(ValueError) as caught:
        family.check_request(request(**changes), family.published.facts, "requests[2].")
    assert f"requests[2].{message}" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.attention_kernel=math", "model.attention_kernel='math' does not go with the skip-sparse attention"),
        ("attention.balance=rows", "attention.balance='rows' does not go with the skip-sparse attention"),
        ("memory.precompute_modulation=true", "memory.precompute_modulation=true: model.family='open-sora-plan' has"),
        ("decode.tile_height=256", "decode.tile_height=256 means nothing to model.family='open-sora-plan', whose"),
        ("decode.tile_overlap_frames=4", "decode.tile_overlap_frames=4 means nothing to model.family='open-sora-plan'"),
        ("decode.tile_preset=official", "decode.tile_preset='official' means nothing to model.family='open-sora-plan'"),
    ],
)
def test_options_of_other_families_are_refused(checkpoint: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenSoraPlanPipeline.from_pretrained(checkpoint, overrides=["model.family=open-sora-plan", setting])
    assert message in str(caught.value)
    assert "nearest is" in str(caught.value)


def test_a_checkpoint_of_another_kind_is_refused(checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    family = OpenSoraPlan()
    assert family.facts(Checkpoint(str(checkpoint))).attention_layers == 6
    with pytest.raises(CheckpointError, match="transformer is a HunyuanVideoTransformer3DModel, but"):
        family.facts(Checkpoint(str(tiny_checkpoint)))
    with pytest.raises(CheckpointError, match=r"transformer: none of .*any93x640x640 holds config.json"):
        family.facts(Checkpoint(str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"is not a directory: .* google/mt5-xxl"):
        family.facts(Checkpoint(family.published.location))


def test_what_the_call_cannot_use_is_refused(checkpoint: Path, launcher: LocalLauncher) -> None:
    one_rank = {"groups": {"vae_ranks": 0}, "runtime": {"threads_per_rank": 1}}  # the class says which family it is
    with OpenSoraPlanPipeline.from_pretrained(checkpoint, config=one_rank, launcher=launcher) as pipe:
        with pytest.raises(ValueError, match=r"generator is given: .* nearest is seed=11"):
            call(pipe, "latent", generator=torch.Generator().manual_seed(11), seed=None)
        with pytest.raises(ValueError, match="prompt_embeds is given: Open-Sora-Plan is rendered from prompts"):
            call(pipe, "latent", prompt=None, prompt_embeds=torch.zeros(1, 4, 48))
        noise = draw_noise((1, 8, 3, 6, 10), 5)
        assert torch.equal(call(pipe, "latent", latents=noise), call(pipe, "latent"))
        assert not torch.equal(call(pipe, "latent", latents=noise + 1e-2), call(pipe, "latent"))


def test_a_configuration_of_another_family_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.family='hunyuan-video' is not what OpenSoraPlanPipeline renders"):
        OpenSoraPlanPipeline.from_pretrained(checkpoint, config={"model": {"family": "hunyuan-video"}})
    with pytest.raises(ConfigError, match=r"model.family='hunyuan-video' is not what OpenSoraPlanPipeline renders"):
        OpenSoraPlanPipeline.from_pretrained(checkpoint, overrides=["model.family=hunyuan-video"])


def test_a_converted_checkpoint_gives_the_same_clip_and_can_be_explained(
    checkpoint: Path, launcher: LocalLauncher, parts: OpenSoraPlanParts, tmp_path: Path
) -> None:
    converted = convert(find_folders(checkpoint), tmp_path / "osp")
    with start(converted, launcher, 1, 1) as pipe:
        assert torch.equal(call(pipe, "latent"), one_process(parts)[0])
        explained = explain_config(load_config(msgspec.to_builtins(pipe.config), ["request.num_frames=17"]))
        loaded = pipe.engine.weight_bytes
    assert {rank.rank: rank.weight_bytes for rank in explained.ranks} == loaded


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_of_an_official_checkpoint_are_explained_as_they_are_loaded(
    checkpoint: Path, launcher: LocalLauncher, dtype: str
) -> None:
    """Pickles whose headers nobody reads; mT5 without its decoder, and in fp16 with a part in fp32."""
    with start(checkpoint, launcher, 1, 1, f"model.text_encoder_dtype={dtype}") as pipe:
        explained = explain_config(load_config(msgspec.to_builtins(pipe.config)))
        loaded = pipe.engine.weight_bytes
    assert {rank.rank: rank.weight_bytes for rank in explained.ranks} == loaded
    assert min(size for weights in loaded.values() for size in weights.values()) > 0
    assert explained.weights_from == f"the config files of {checkpoint}"
