"""Compares two renders of a video frame by frame: how far they are apart, where, and since which step.

Functions on frames [T, H, W, 3] are in `metrics` and `temporal`, whole clips in `compare`. Video, torch and report
libraries are imported where they are used.
"""

from videopipe.quality.clips import ClipInfo, open_clip
from videopipe.quality.compare import Comparison, compare_clips
from videopipe.quality.metrics import mae, max_abs, ms_ssim, mse, psnr, ssim
from videopipe.quality.temporal import flicker, frame_changes, seam_scores

__all__ = [
    "ClipInfo",
    "Comparison",
    "compare_clips",
    "flicker",
    "frame_changes",
    "mae",
    "max_abs",
    "ms_ssim",
    "mse",
    "open_clip",
    "psnr",
    "seam_scores",
    "ssim",
]
