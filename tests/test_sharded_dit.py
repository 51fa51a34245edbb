"""The real tiny HunyuanVideo DiT on several ranks gives what diffusers' pipeline gives in one process.

Two denoising steps of every case, text trimmed and text padded, compared as final latents in fp32. One rank is
bit-equal; several are within 1e-5, and deliberate mistakes are at least a hundred times further away.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from numpy.typing import NDArray
from torch import Tensor

from dit_group.attention import Layout, SequenceParallel
from dit_group.call import AttentionCall
from dit_group.denoise import draw_noise
from dit_group.plan import Shard, apply_plan
from dit_group.shards import gather_latents
from dit_group.ulysses import Ulysses
from pipelines.checkpoint import Checkpoint
from pipelines.hunyuan_video import latent_geometry
from pipelines.hunyuan_video_parts import (
    PLAN,
    HunyuanVideoDenoiser,
    HunyuanVideoTextEncoder,
    JointAttentionProcessor,
    parallelize,
)
from tests.ranks import leave, run_ranks
from tools.make_tiny_checkpoint import make_hunyuan_video
from videopipe.arrangement import Guidance
from videopipe.config import load_config
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime

TOLERANCE = 1e-5
TEXT = 16  # text tokens, padding included
ODD = VideoSpec(height=80, width=112, num_frames=9)  # 3 x 5 x 7 = 105 video tokens
SMALL = VideoSpec(height=48, width=80, num_frames=5)  # 2 x 3 x 5 = 30 video tokens


class Case(NamedTuple):
    """A size, and how many text tokens are valid in each branch."""

    spec: VideoSpec
    valid: int
    negative: int | None = None


CASES = {
    "odd sizes": Case(ODD, 4),  # padding on several members: were it all on the last, its order would not matter
    "fewer text tokens than ranks": Case(SMALL, 2),
    "two branches of different length": Case(SMALL, 11, negative=4),
    "nothing padded": Case(SMALL, TEXT),
}

Arrays = dict[str, NDArray[np.float32]]


def request_of(case: Case) -> VideoRequest:
    return VideoRequest(
        id="clip",
        prompt="not encoded",
        negative_prompt=None if case.negative is None else "not encoded either",
        true_cfg_scale=1.0 if case.negative is None else 3.0,
        spec=case.spec,
        num_inference_steps=2,
        seed=3,
    )


def conditioning_of(case: Case) -> dict[str, Tensor]:
    """Random embeddings, in padded places too: whoever looks there gets another result."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for prefix, valid in (("", case.valid), ("negative_", case.negative)):
        if valid is not None:
            tensors[prefix + "prompt_embeds"] = torch.randn(1, TEXT, 64, generator=generator)
            tensors[prefix + "pooled_prompt_embeds"] = torch.randn(1, 32, generator=generator)
            tensors[prefix + "prompt_attention_mask"] = (torch.arange(TEXT)[None] < valid).long()
    return tensors


def by_diffusers(pipe: HunyuanVideoPipeline, case: Case) -> Tensor:
    request = request_of(case)
    frames: Tensor = pipe(
        height=case.spec.height,
        width=case.spec.width,
        num_frames=case.spec.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        true_cfg_scale=request.true_cfg_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **conditioning_of(case),
    ).frames
    return frames


def by_us(denoiser: HunyuanVideoDenoiser, case: Case, **changes: Any) -> Tensor:
    request = request_of(case)
    noise = draw_noise(denoiser.latent_shape(request), changes.get("seed", request.seed))
    run = denoiser.begin(request, conditioning_of(case), noise)
    for step in range(run.num_steps):
        run.step(step)
    return run.latents()


def make_denoiser(path: str, runtime: Runtime, **settings: Any) -> HunyuanVideoDenoiser:
    config = load_config(
        {
            "model": {"weights": path, "attention_kernel": settings.get("kernel", "sdpa")},
            "groups": {"dit_ranks": len(runtime.dit_ranks)},
            "attention": {key: settings[key] for key in settings if key != "kernel"},
        }
    )
    return HunyuanVideoDenoiser(Checkpoint(path), config, runtime)


def relative(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).norm() / other.norm())


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {4: tiny_checkpoint, 24: make_hunyuan_video(tmp_path_factory.mktemp("tiny") / "24", heads=24, seed=1)}


@pytest.fixture(scope="module")
def pipes(checkpoints: dict[int, Path]) -> dict[int, HunyuanVideoPipeline]:
    pipes = {}
    for heads, path in checkpoints.items():
        pipes[heads] = HunyuanVideoPipeline.from_pretrained(path, dtype=torch.float32)
        pipes[heads].set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module")
def expected(pipes: dict[int, HunyuanVideoPipeline]) -> dict[int, Arrays]:
    return {
        heads: {name: by_diffusers(pipe, case).numpy() for name, case in CASES.items()} for heads, pipe in pipes.items()
    }


# -- several ranks


WAYS: tuple[dict[str, Any], ...] = (
    {"text": "trimmed"},
    {"text": "padded"},
    {"text": "padded", "heads_per_chunk": 1},
    {"text": "trimmed", "heads_per_chunk": 2, "balance": "rows"},
    {"text": "padded", "balance": "rows", "overlap_mlp": False},
)


def render_all(runtime: Runtime, path: str, expected: Arrays) -> dict[str, float]:
    """How far every case is from diffusers, with each way to move heads."""
    found = {}
    for settings in WAYS:
        denoiser = make_denoiser(path, runtime, **settings)
        for name, case in CASES.items():
            found[f"{name}, {settings}"] = relative(by_us(denoiser, case), torch.from_numpy(expected[name]))
    leave(runtime)
    return found


@pytest.mark.parametrize(
    ("heads", "world_size"),
    [
        *[(4, 2), (4, 3), (4, 7), (24, 5)],
        *[pytest.param(4, n, marks=pytest.mark.slow) for n in (5, 8)],
        *[pytest.param(24, n, marks=pytest.mark.slow) for n in (2, 3, 7, 8)],
    ],
)
def test_sharded_model_equals_diffusers_in_one_process(
    checkpoints: dict[int, Path], expected: dict[int, Arrays], heads: int, world_size: int
) -> None:
    for found in run_ranks(render_all, world_size, str(checkpoints[heads]), expected[heads], timeout=120):
        assert len(found) == len(WAYS) * len(CASES)
        assert max(found.values()) <= TOLERANCE, found


def rolled_rope(denoiser: HunyuanVideoDenoiser, parallel: SequenceParallel) -> None:
    """Each member takes the rotary angles of tokens one place away."""
    denoiser.transformer.rope.register_forward_hook(
        lambda module, args, output: tuple(x.roll(1, dims=0) for x in output), prepend=True
    )


def unmasked_padding(denoiser: HunyuanVideoDenoiser, parallel: SequenceParallel) -> None:
    lay_out = parallel.lay_out

    def without_mask(
        num_video: int, num_text: int, text_mask: Tensor | None, helpers: tuple[int, ...], guidance: Guidance
    ) -> Layout:
        return lay_out(num_video, num_text, None, helpers, guidance)

    parallel.lay_out = without_mask  # type: ignore[method-assign]


def mask_in_plain_order(denoiser: HunyuanVideoDenoiser, parallel: SequenceParallel) -> None:
    """The mask follows [all video | all text], as it would in one process."""
    lay_out = parallel.lay_out

    def unpermuted(
        num_video: int, num_text: int, text_mask: Tensor | None, helpers: tuple[int, ...], guidance: Guidance
    ) -> Layout:
        layout = lay_out(num_video, num_text, text_mask, helpers, guidance)
        assert text_mask is not None
        assert isinstance(layout.attention, Ulysses)
        layout.attention.key_mask = torch.cat([text_mask.new_ones(1, num_video), text_mask], dim=1)
        return layout

    parallel.lay_out = unpermuted  # type: ignore[method-assign]


def swapped_heads(denoiser: HunyuanVideoDenoiser, parallel: SequenceParallel) -> None:
    begin = parallel.begin

    def swapped() -> AttentionCall:
        call = begin()
        key = call.key
        call.key = lambda k: key(k[:, :, [1, 0, *range(2, k.shape[2])]])  # type: ignore[method-assign]
        return call

    parallel.begin = swapped  # type: ignore[method-assign]


def text_of_another_member(denoiser: HunyuanVideoDenoiser, parallel: SequenceParallel) -> None:
    """Text tokens are dealt out in the wrong order, so that the mask does not fit."""
    denoiser.transformer.context_embedder.register_forward_hook(
        lambda module, args, output: output.flip(1), prepend=True
    )


Twin = Callable[[HunyuanVideoDenoiser, SequenceParallel], None]
TWINS: tuple[Twin, ...] = (rolled_rope, unmasked_padding, mask_in_plain_order, swapped_heads, text_of_another_member)


def render_twins(runtime: Runtime, path: str, expected: Arrays) -> dict[str, float]:
    found = {}
    for twin in TWINS:
        denoiser = make_denoiser(path, runtime, text="padded")
        assert denoiser._parallel is not None
        twin(denoiser, denoiser._parallel)
        found[twin.__name__] = relative(by_us(denoiser, CASES["odd sizes"]), torch.from_numpy(expected["odd sizes"]))
    leave(runtime)
    return found


def test_mistakes_are_far_outside_the_tolerance(checkpoints: dict[int, Path], expected: dict[int, Arrays]) -> None:
    found = run_ranks(render_twins, 3, str(checkpoints[4]), expected[4])[0]
    assert set(found) == {twin.__name__ for twin in TWINS}
    assert min(found.values()) > 100 * TOLERANCE, found


def hook_and_unhook(runtime: Runtime, path: str) -> None:
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(path, subfolder="transformer").eval()
    case = CASES["odd sizes"]
    conditioning = conditioning_of(case)
    mask = conditioning["prompt_attention_mask"]
    inputs = {
        "hidden_states": draw_noise((1, 16, 3, 10, 14), 0),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": mask.float(),
        "pooled_projections": conditioning["pooled_prompt_embeds"],
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }
    parallel = SequenceParallel(
        group=runtime.exchange_group, member=runtime.rank, members=runtime.world_size, num_heads=4
    )
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    with torch.no_grad():
        plain = transformer(**inputs)[0]
        parallel.use(parallel.lay_out(105, TEXT, mask.bool()))
        handles = apply_plan(transformer, PLAN, parallel)
        for block in blocks:
            block.attn.set_processor(JointAttentionProcessor(parallel))
        sharded = gather_latents(transformer(**inputs)[0], parallel.layout, latent_geometry(Checkpoint(path)))
        for handle in handles:
            handle.remove()
        for block in blocks:
            block.attn.set_processor(HunyuanVideoAttnProcessor2_0())
        again = transformer(**inputs)[0]
    assert 0 < relative(sharded, plain) <= TOLERANCE
    assert torch.equal(again, plain)
    leave(runtime)


def test_removing_the_hooks_gives_back_the_plain_model(checkpoints: dict[int, Path]) -> None:
    run_ranks(hook_and_unhook, 3, str(checkpoints[4]))


def test_a_plan_for_a_module_that_is_not_there_is_refused(pipes: dict[int, HunyuanVideoPipeline]) -> None:
    parallel = SequenceParallel(group=None, member=0, members=1, num_heads=4)
    with pytest.raises(AttributeError, match="no_such_embedder"):
        apply_plan(pipes[4].transformer, (Shard(module="no_such_embedder", dim=1, stream="video"),), parallel)


# -- one rank


ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dit_ranks=(0,))


@pytest.mark.parametrize("heads", [4, 24])
def test_one_rank_is_bit_equal_to_diffusers(
    checkpoints: dict[int, Path], expected: dict[int, Arrays], heads: int
) -> None:
    denoiser = make_denoiser(str(checkpoints[heads]), ALONE)
    for name, case in CASES.items():
        assert torch.equal(by_us(denoiser, case), torch.from_numpy(expected[heads][name])), name
    assert not torch.equal(by_us(denoiser, case, seed=4), torch.from_numpy(expected[heads][name]))


@pytest.mark.parametrize(("text", "kernel"), [("trimmed", "sdpa"), ("padded", "math"), ("trimmed", "math")])
def test_one_rank_with_our_own_attention_is_within_the_tolerance(
    checkpoints: dict[int, Path], expected: dict[int, Arrays], text: str, kernel: str
) -> None:
    denoiser = make_denoiser(str(checkpoints[4]), ALONE, text=text, kernel=kernel)
    for name, case in CASES.items():
        assert relative(by_us(denoiser, case), torch.from_numpy(expected[4][name])) <= TOLERANCE, name


def test_our_attention_processor_alone_agrees_with_the_plain_model(checkpoints: dict[int, Path]) -> None:
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(checkpoints[4], subfolder="transformer").eval()
    parallel = SequenceParallel(group=None, member=0, members=1, num_heads=4)
    case = CASES["nothing padded"]
    conditioning = conditioning_of(case)
    inputs = {
        "hidden_states": draw_noise((1, 16, 2, 6, 10), 0),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"].float(),
        "pooled_projections": conditioning["pooled_prompt_embeds"],
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        plain = transformer(**inputs)[0]
        parallelize(transformer, parallel)
        parallel.use(parallel.lay_out(30, TEXT, conditioning["prompt_attention_mask"].bool()))
        ours = transformer(**inputs)[0]
    assert relative(ours, plain) <= 1e-6


def test_conditioning_is_what_diffusers_encodes(
    checkpoints: dict[int, Path], pipes: dict[int, HunyuanVideoPipeline]
) -> None:
    path = str(checkpoints[4])
    encoder = HunyuanVideoTextEncoder(Checkpoint(path), load_config({"model": {"weights": path}}), ALONE)
    request = VideoRequest(
        id="fox", prompt="a red fox", negative_prompt="gray", true_cfg_scale=2.0, spec=SMALL, max_sequence_length=32
    )
    ours = encoder.encode(request, {})
    assert len(ours) == 6
    for prefix, prompt in (("", "a red fox"), ("negative_", "gray")):
        embeds, pooled, mask = pipes[4].encode_prompt(prompt=prompt, max_sequence_length=32)
        assert torch.equal(ours[prefix + "prompt_embeds"], embeds)
        assert torch.equal(ours[prefix + "pooled_prompt_embeds"], pooled)
        assert torch.equal(ours[prefix + "prompt_attention_mask"], mask)
    assert not torch.equal(ours["prompt_embeds"], ours["negative_prompt_embeds"])
