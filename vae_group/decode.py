"""From decoded video to frames: conversion on the device, so that only bytes cross to the host."""

import torch
from torch import Tensor


def to_frames(video: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Frames of one clip, or of a part of it, as a viewer wants them.

    Args:
        video: [1, 3, T, H, W] in -1..1, as a VAE decodes it; any floating dtype.
        dtype: torch.uint8 for 0..255, torch.float32 for 0..1.
    Returns:
        [T, H, W, 3] on the same device, contiguous; the same values as diffusers' VideoProcessor gives for PIL (uint8)
        or NumPy (float32) output.
    """
    B, C, T, H, W = video.shape
    assert (B, C) == (1, 3), video.shape
    unit = (video[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).float()  # [T, H, W, 3]
    if dtype == torch.float32:
        return unit.contiguous()
    return (unit * 255).round().to(torch.uint8).contiguous()


def to_host(frames: Tensor) -> Tensor:
    """Frames on the host; from CUDA by one copy into page-locked memory, which needs no staging buffer of the driver's.

    Returns when the copy is complete. torch keeps page-locked memory for the next clip.
    """
    if frames.device.type != "cuda":
        return frames.cpu()
    host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
    host.copy_(frames, non_blocking=True)
    torch.cuda.current_stream(frames.device).synchronize()
    return host
