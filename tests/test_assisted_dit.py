"""The real tiny HunyuanVideo DiT of 24 heads with one to three helpers gives what diffusers gives in one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import HunyuanVideoPipeline

from dit_group.assist import Assistant
from dit_group.denoise import draw_noise
from pipelines.checkpoint import Checkpoint
from pipelines.hunyuan_video import HunyuanVideo
from pipelines.hunyuan_video_parts import HunyuanVideoAssistant, HunyuanVideoDenoiser
from tests.ranks import leave, run_ranks
from tests.test_sharded_dit import CASES, TOLERANCE, Arrays, by_diffusers, conditioning_of, relative, request_of
from tools.make_tiny_checkpoint import make_hunyuan_video
from videopipe.config import load_config
from videopipe.runtime import Runtime

NAMES = ("odd sizes", "two branches of different length", "fewer text tokens than ranks")
WAYS: tuple[dict[str, Any], ...] = (
    {"text": "padded", "heads_per_chunk": 1},
    {"heads_per_chunk": 3, "balance": "rows"},
    {"ping_pong": "on", "balance": "rows", "overlap_mlp": False},
)


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hunyuan_video(tmp_path_factory.mktemp("wide") / "24", heads=24, seed=1)


@pytest.fixture(scope="module")
def expected(wide_checkpoint: Path) -> Arrays:
    pipe = HunyuanVideoPipeline.from_pretrained(wide_checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return {name: by_diffusers(pipe, CASES[name]).numpy() for name in NAMES}


def render_all(runtime: Runtime, path: str, expected: Arrays, helper_counts: tuple[int, ...]) -> dict[str, float]:
    """How far every case is from diffusers; empty on helpers."""
    found = {}
    for helpers in helper_counts:
        members = runtime.world_size - helpers
        lent = tuple(range(members, runtime.world_size))
        exchange = dist.new_group(list(range(members)))
        assist = dist.new_group(list(range(runtime.world_size)))
        mine = replace(runtime, dit_ranks=tuple(range(members)), exchange_group=exchange, assist_groups={lent: assist})
        for way in WAYS:
            config = load_config(
                {
                    "model": {"weights": path},
                    "groups": {"dit_ranks": members, "vae_ranks": helpers},
                    "attention": {"co_processing": "on", **way},
                }
            )
            if runtime.rank < members:
                denoiser = HunyuanVideoDenoiser(Checkpoint(path), config, mine)
                denoiser.take_help(lent)
            else:
                assistant = HunyuanVideoAssistant(HunyuanVideo().facts(Checkpoint(path)), config, mine)
            for name in NAMES:
                request, conditioning = request_of(CASES[name]), conditioning_of(CASES[name])
                if runtime.rank >= members:
                    masks = [v for k, v in conditioning.items() if k.endswith("prompt_attention_mask")]
                    assistant.prepare(request, [bytes(mask[0].tolist()) for mask in masks], recorded=False)
                    for _ in range(request.num_inference_steps):
                        assistant.step(request.id, lent)
                    assistant.forget(request.id)
                    continue
                run = denoiser.begin(request, conditioning, draw_noise(denoiser.latent_shape(request), request.seed))
                for step in range(run.num_steps):
                    run.step(step)
                error = relative(run.latents(), torch.from_numpy(expected[name]))
                found[f"{helpers} helpers, {way}, {name}"] = error
    leave(runtime)
    return found


@pytest.mark.parametrize(
    ("world_size", "helper_counts"), [(5, (1, 2, 3)), pytest.param(8, (1,), marks=pytest.mark.slow)]
)
def test_a_helped_model_equals_diffusers_in_one_process(
    wide_checkpoint: Path, expected: Arrays, world_size: int, helper_counts: tuple[int, ...]
) -> None:
    ranks = run_ranks(render_all, world_size, str(wide_checkpoint), expected, helper_counts, timeout=240)
    assert len(ranks[0]) == len(helper_counts) * len(WAYS) * len(NAMES) and not ranks[-1]
    assert max(max(found.values()) for found in ranks if found) <= TOLERANCE, ranks[0]


def render_with_a_helper_that_forgets_the_mask(runtime: Runtime, path: str, expected: Arrays) -> dict[str, float]:
    """The twin: helpers see padded text."""
    prepare = Assistant.prepare

    def unmasked(self: Assistant, request: str, num_video: int, text_masks: Any, *more: Any, **named: Any) -> None:
        prepare(self, request, num_video, [torch.ones_like(mask) for mask in text_masks], *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assistant, "prepare", unmasked)
        return render_all(runtime, path, expected, (1,))


def test_a_helper_that_forgets_the_mask_is_noticed(wide_checkpoint: Path, expected: Arrays) -> None:
    found = run_ranks(render_with_a_helper_that_forgets_the_mask, 3, str(wide_checkpoint), expected, timeout=120)[0]
    padded = {name: error for name, error in found.items() if "padded" in name}
    assert len(padded) == len(NAMES) and min(padded.values()) > 100 * TOLERANCE, padded
