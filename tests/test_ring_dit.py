"""The real tiny HunyuanVideo DiT with 24 heads under ring and USP gives what diffusers gives in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor

import dit_group.ring
from pipelines import HunyuanVideoPipeline as OurPipeline
from pipelines.checkpoint import Checkpoint
from pipelines.hunyuan_video_parts import HunyuanVideoDenoiser
from pipelines.launch import LocalLauncher
from tests.ranks import leave, run_ranks
from tests.test_sharded_dit import CASES, TOLERANCE, Arrays, by_diffusers, by_us, relative
from tools.make_tiny_checkpoint import make_hunyuan_video
from videopipe.config import ConfigError, load_config
from videopipe.runtime import Runtime

HEADS = 24
WAYS: tuple[dict[str, Any], ...] = (
    {"strategy": "ring", "text": "trimmed"},
    {"strategy": "ring", "text": "padded"},
    {"strategy": "usp", "text": "trimmed", "ulysses_degree": 2, "heads_per_chunk": 5},
    {"strategy": "usp", "text": "padded", "ulysses_degree": 2, "mesh_inside": "ring"},
    {"strategy": "usp", "text": "trimmed", "ulysses_degree": 1},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hunyuan_video(tmp_path_factory.mktemp("tiny"), heads=HEADS, seed=1)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Arrays:
    pipe = HunyuanVideoPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return {name: by_diffusers(pipe, case).numpy() for name, case in CASES.items()}


def make_denoiser(path: str, runtime: Runtime, settings: dict[str, Any]) -> HunyuanVideoDenoiser:
    members = len(runtime.dit_ranks)
    config = load_config(
        {"model": {"weights": path}, "groups": {"dit_ranks": members}, "attention": settings},
    )
    return HunyuanVideoDenoiser(Checkpoint(path), config, runtime)


def render_all(runtime: Runtime, path: str, expected: Arrays) -> dict[str, float]:
    found = {}
    for settings in WAYS:
        if runtime.world_size % settings.get("ulysses_degree", 1):
            continue
        denoiser = make_denoiser(path, runtime, settings)
        for name, case in CASES.items():
            found[f"{name}, {settings}"] = relative(by_us(denoiser, case), torch.from_numpy(expected[name]))
    leave(runtime)
    return found


@pytest.mark.parametrize(("world_size", "ways"), [(5, 3), (6, 5), pytest.param(8, 5, marks=pytest.mark.slow)])
def test_ring_and_usp_equal_diffusers_in_one_process(
    checkpoint: Path, expected: Arrays, world_size: int, ways: int
) -> None:
    for found in run_ranks(render_all, world_size, str(checkpoint), expected, timeout=120):
        assert len(found) == ways * len(CASES)
        assert max(found.values()) <= TOLERANCE, found


def render_twins(runtime: Runtime, path: str, expected: Arrays) -> dict[str, float]:
    """Partial results that are averaged, and a neighbour's block that never comes round."""

    def averaged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
        return (out + other) / 2, lse

    def first_only(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
        return out, lse

    found = {}
    truth = torch.from_numpy(expected["odd sizes"])
    for twin in (averaged, first_only):
        denoiser = make_denoiser(path, runtime, {"strategy": "ring", "text": "padded"})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dit_group.ring, "merge_partial", twin)
            found[twin.__name__] = relative(by_us(denoiser, CASES["odd sizes"]), truth)
    leave(runtime)
    return found


def test_mistakes_in_the_ring_are_far_outside_the_tolerance(checkpoint: Path, expected: Arrays) -> None:
    found = run_ranks(render_twins, 3, str(checkpoint), expected)[0]
    assert min(found.values()) > 100 * TOLERANCE, found


# -- through the engine and real processes

CALL: dict[str, Any] = {"height": 64, "width": 48, "num_frames": 17, "num_inference_steps": 2, "output_type": "latent"}


def test_a_mesh_of_ranks_renders_what_diffusers_renders(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    theirs = HunyuanVideoPipeline.from_pretrained(tiny_checkpoint)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("a red fox", generator=torch.Generator().manual_seed(5), **CALL).frames
    config = {
        "runtime": {"threads_per_rank": 1},
        "attention": {"strategy": "usp", "ulysses_degree": 2, "mesh_inside": "ring"},
    }
    with OurPipeline.from_pretrained(
        tiny_checkpoint, config=config, dit_ranks=4, vae_ranks=1, launcher=launcher
    ) as pipe:
        for seed, near in ((5, True), (6, False)):
            ours = torch.as_tensor(pipe("a red fox", generator=torch.Generator().manual_seed(seed), **CALL).frames)
            assert (relative(ours, expected) <= TOLERANCE) == near


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention_kernel=sage"], "needs the package sageattention: pip install"),
        (
            ["model.attention_kernel=sdpa-cudnn", "runtime.device=cpu"],
            "needs a CUDA device, not cpu; nearest is 'sdpa'",
        ),
        (["attention.strategy=usp", "groups.dit_ranks=8", "attention.ulysses_degree=8"], "4 heads, nearest is 4"),
    ],
)
def test_what_cannot_run_is_refused_before_ranks_start(
    tiny_checkpoint: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        OurPipeline.from_pretrained(tiny_checkpoint, overrides=overrides)
