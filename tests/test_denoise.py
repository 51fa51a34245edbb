"""The denoising loop, the noise, and the frames: steps in order, one seed one noise, the bytes that diffusers gives."""

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from dit_group.denoise import Denoising, draw_noise
from vae_group.decode import to_frames

# -- the loop


def recording(log: list[tuple[str, float, float]], num_steps: int = 3) -> Denoising:
    """Predicts half the latents and adds timestep times the prediction."""

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        log.append(("predict", float(timestep), float(latents)))
        return latents / 2

    def advance(prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        log.append(("advance", float(timestep), float(latents)))
        return latents + timestep * prediction

    return Denoising(predict, advance, torch.tensor(8.0), torch.tensor([3.0, 2.0, 1.0])[:num_steps])


def test_every_step_predicts_then_advances_with_its_own_timestep() -> None:
    log: list[tuple[str, float, float]] = []
    run = recording(log)
    assert (run.num_steps, run.next_step) == (3, 0)
    for step in range(3):
        run.step(step)
    assert log == [
        ("predict", 3.0, 8.0),
        ("advance", 3.0, 8.0),
        ("predict", 2.0, 20.0),
        ("advance", 2.0, 20.0),
        ("predict", 1.0, 40.0),
        ("advance", 1.0, 40.0),
    ]
    assert float(run.latents()) == 60.0
    assert run.next_step == 3


@pytest.mark.parametrize("order", [[1], [0, 0], [0, 2], [0, 1, 2, 3], [-1]])
def test_steps_come_in_order_and_each_once(order: list[int]) -> None:
    run = recording([])
    for step in order[:-1]:
        run.step(step)
    with pytest.raises(AssertionError):
        run.step(order[-1])


# -- the noise


def test_the_same_seed_gives_the_same_noise_whatever_happened_before() -> None:
    shape = (1, 16, 3, 4, 6)
    torch.manual_seed(0)
    first = draw_noise(shape, 7)
    torch.manual_seed(123)
    torch.rand(1000)
    state = torch.get_rng_state()
    assert torch.equal(draw_noise(shape, 7), first)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves no trace
    assert (first.shape, first.dtype, first.device.type) == (shape, torch.float32, "cpu")


def test_noise_of_the_global_generator_would_depend_on_what_happened_before() -> None:
    torch.manual_seed(7)
    first = torch.randn(4)
    assert not torch.equal(torch.randn(4), first)


def test_another_seed_gives_other_noise() -> None:
    shape = (1, 16, 3, 4, 6)
    assert not torch.equal(draw_noise(shape, 8), draw_noise(shape, 7))
    assert abs(float(draw_noise(shape, 8).mean())) < 0.1
    assert abs(float(draw_noise(shape, 8).std()) - 1) < 0.1


def test_noise_is_what_a_pipeline_of_diffusers_draws() -> None:
    shape = (1, 16, 3, 4, 6)
    theirs = randn_tensor(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    assert torch.equal(draw_noise(shape, 7), theirs)


# -- the frames


def decoded(dtype: torch.dtype) -> Tensor:
    """[1, 3, T, H, W] somewhat beyond -1..1, with values right between two bytes."""
    video = torch.randn(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 0.7
    steps = (torch.arange(16 * 24).reshape(16, 24) % 511) / 255 - 1  # every byte, and every half between two
    video[0, 0, 0] = steps
    return video.to(dtype)


def by_diffusers(video: Tensor, output: str) -> np.ndarray:
    processed = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type=output)
    if output == "pil":
        return np.stack([np.asarray(image) for image in processed[0]])
    return processed[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_pil_output(dtype: torch.dtype) -> None:
    frames = to_frames(decoded(dtype))
    assert (frames.dtype, frames.shape, frames.is_contiguous()) == (torch.uint8, (5, 16, 24, 3), True)
    assert np.array_equal(frames.numpy(), by_diffusers(decoded(dtype), "pil"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_are_those_of_numpy_output(dtype: torch.dtype) -> None:
    frames = to_frames(decoded(dtype), torch.float32)
    assert (frames.dtype, frames.shape, frames.is_contiguous()) == (torch.float32, (5, 16, 24, 3), True)
    assert np.array_equal(frames.numpy(), by_diffusers(decoded(dtype), "np"))


def test_frames_made_in_another_way_are_noticed() -> None:
    video = decoded(torch.bfloat16)
    truth = by_diffusers(video, "pil")
    late = ((video[0].float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0) * 255).round().to(torch.uint8)
    cut = (to_frames(video, torch.float32) * 255).to(torch.uint8)
    swapped = to_frames(video.flip(1))
    for wrong in (late, cut, swapped):
        assert not np.array_equal(wrong.numpy(), truth)


def test_more_than_one_clip_is_a_programmer_error() -> None:
    with pytest.raises(AssertionError):
        to_frames(torch.zeros(2, 3, 1, 8, 8))
