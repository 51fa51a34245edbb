"""On a CUDA device: the same code as on the CPU, with NCCL where there are several devices."""

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline as DiffusersPipeline

from pipelines import HunyuanVideoPipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CALL = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 4, "output_type": "latent"}


def reference(checkpoint: Path, dtype: torch.dtype) -> torch.Tensor:
    pipeline = DiffusersPipeline.from_pretrained(str(checkpoint), torch_dtype=dtype).to("cuda")
    return pipeline("a red fox", **CALL, generator=torch.Generator("cpu").manual_seed(5)).frames.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_gpu_equals_diffusers(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, torch_dtype=dtype, dit_ranks=1, vae_ranks=0) as pipe:
        ours = pipe("a red fox", **CALL, generator=torch.Generator("cpu").manual_seed(5)).frames
        again = pipe("a red fox", **CALL, generator=torch.Generator("cpu").manual_seed(5)).frames
    theirs = reference(tiny_checkpoint, dtype)
    assert torch.equal(ours, again)
    limit = 0.0 if dtype == torch.float32 else 2.5e-2
    assert ((ours - theirs).norm() / theirs.norm()).item() <= limit


def test_trimmed_text_on_one_gpu(tiny_checkpoint: Path) -> None:
    with HunyuanVideoPipeline.from_pretrained(
        tiny_checkpoint, dit_ranks=1, vae_ranks=0, overrides=["attention.text='trimmed'"]
    ) as pipe:
        ours = pipe("a red fox", **CALL, generator=torch.Generator("cpu").manual_seed(5)).frames
    theirs = reference(tiny_checkpoint, torch.float32)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("dit_ranks", "vae_ranks"), [(1, 1), (2, 0), (2, 1), (3, 1), (7, 1)])
def test_several_gpus_equal_one(tiny_checkpoint: Path, dit_ranks: int, vae_ranks: int) -> None:
    if dit_ranks + vae_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {dit_ranks + vae_ranks} CUDA devices")
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, dit_ranks=dit_ranks, vae_ranks=vae_ranks) as pipe:
        ours = pipe("a red fox", **CALL, generator=torch.Generator("cpu").manual_seed(5)).frames
    theirs = reference(tiny_checkpoint, torch.float32)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


def test_frames_leave_the_device_as_bytes_into_page_locked_memory() -> None:
    from vae_group.decode import to_frames, to_host

    video = torch.rand(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    on_device = to_frames(video.cuda())
    frames = to_host(on_device)
    assert on_device.is_cuda and on_device.dtype == torch.uint8
    assert frames.is_pinned() and torch.equal(frames, on_device.cpu())
