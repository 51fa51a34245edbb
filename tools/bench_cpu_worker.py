"""One side of the CPU benchmark in a process of its own: answers JSON lines on stdin with JSON lines on stdout.

Requests, each answered by one line:
    {"op": "render", "requests": [VideoRequest], "frames_dir": path or null}
        -> {"seconds": all clips, "first_clip_s": the first of them, "clips": n}
    {"op": "stages", "request": VideoRequest, "threads": n, "repetitions": n}      (diffusers only)
        -> {"threads": n, "encode_s": ..., "denoise_s": ..., "decode_s": ...}
The first line says {"ready": true} once the model is loaded. End of input ends the process.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import diffusers
import msgspec
import numpy as np
import torch

from videopipe.records import VideoRequest

Frames = tuple[str, np.ndarray]
"""Request id and its uint8 frames [T, H, W, 3]."""


class Side(Protocol):
    """What both sides can do."""

    def render(self, requests: list[VideoRequest]) -> Iterator[Frames]: ...

    def stages(self, request: VideoRequest, threads: int, repetitions: int) -> dict[str, float]: ...


class DiffusersSide:
    """diffusers' own pipeline, one clip after the other, every stage on all threads."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.threads = threads
        self.pipe = diffusers.HunyuanVideoPipeline.from_pretrained(model, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)

    def _call(self, request: VideoRequest, output_type: str) -> Any:
        return self.pipe(
            request.prompt,
            height=request.spec.height,
            width=request.spec.width,
            num_frames=request.spec.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            max_sequence_length=request.max_sequence_length,
            generator=torch.Generator().manual_seed(request.seed),
            output_type=output_type,
        ).frames

    def render(self, requests: list[VideoRequest]) -> Iterator[Frames]:
        for request in requests:
            yield request.id, _to_uint8(self._call(request, "np")[0])

    def stages(self, request: VideoRequest, threads: int, repetitions: int) -> dict[str, float]:
        """Median seconds of each stage of one clip on `threads` threads; one more run before them warms up."""
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {"encode_s": [], "denoise_s": [], "decode_s": []}
        for _ in range(repetitions + 1):
            encode_s, _ = _timed(lambda: self._encode(request))
            both_s, latents = _timed(lambda: self._call(request, "latent"))
            decode_s, _ = _timed(lambda latents=latents: self._decode(latents))  # type: ignore[misc]
            times["encode_s"].append(encode_s)
            times["denoise_s"].append(both_s - encode_s)
            times["decode_s"].append(decode_s)
        torch.set_num_threads(self.threads)
        return {"threads": threads} | {stage: statistics.median(values[1:]) for stage, values in times.items()}

    @torch.no_grad()
    def _encode(self, request: VideoRequest) -> Any:
        return self.pipe.encode_prompt(request.prompt, max_sequence_length=request.max_sequence_length)

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        video = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        return _to_uint8(self.pipe.video_processor.postprocess_video(video, output_type="np")[0])


class VideopipeSide:
    """videopipe with one DiT rank and one VAE rank, which share the cores."""

    def __init__(self, model: str, overrides: list[str]) -> None:
        from pipelines import HunyuanVideoPipeline

        self.pipe = HunyuanVideoPipeline.from_pretrained(
            model,
            config=None,
            overrides=["groups.dit_ranks=1", "groups.vae_ranks=1", "model.dtype=float32", *overrides],
        )

    def render(self, requests: list[VideoRequest]) -> Iterator[Frames]:
        for result in self.pipe.render(requests):
            yield result.request_id, result.frames

    def stages(self, request: VideoRequest, threads: int, repetitions: int) -> dict[str, float]:
        raise ValueError("op='stages' is measured on the diffusers side")


def _to_uint8(video: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, 3] in 0..1 to uint8, rounded."""
    return (video * 255).round().astype(np.uint8)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _render(side: Side, requests: list[VideoRequest], frames_dir: Path | None) -> dict[str, Any]:
    """Time one batch. Frames are written after the clock has stopped."""
    clips: list[Frames] = []
    first_clip_s = 0.0
    start = time.perf_counter()
    for clip in side.render(requests):
        clips.append(clip)
        if len(clips) == 1:
            first_clip_s = time.perf_counter() - start
    seconds = time.perf_counter() - start
    if sorted(name for name, _ in clips) != sorted(request.id for request in requests):
        raise ValueError(f"asked for {[request.id for request in requests]}, got {[name for name, _ in clips]}")
    if frames_dir is not None:
        for name, frames in clips:
            np.save(frames_dir / f"{name}.npy", frames, allow_pickle=False)
    return {"seconds": seconds, "first_clip_s": first_clip_s, "clips": len(clips)}


def _serve(side: Side, commands: TextIO, replies: TextIO) -> None:
    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    reply({"ready": True})
    for line in commands:
        command = json.loads(line)
        if command["op"] == "render":
            requests = msgspec.convert(command["requests"], list[VideoRequest])
            frames_dir = command["frames_dir"]
            reply(_render(side, requests, None if frames_dir is None else Path(frames_dir)))
        elif command["op"] == "stages":
            request = msgspec.convert(command["request"], VideoRequest)
            reply(side.stages(request, command["threads"], command["repetitions"]))
        else:
            raise ValueError(f"op={command['op']!r} is unknown, known are 'render', 'stages'")


def main() -> None:
    """Serve one side until the input ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--side", choices=["diffusers", "videopipe"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()

    # Replies get a descriptor of their own: whatever a library prints goes to stderr.
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        if options.side == "diffusers":
            _serve(DiffusersSide(options.model, options.threads), sys.stdin, replies)
        else:
            side = VideopipeSide(options.model, options.overrides)
            with side.pipe:
                _serve(side, sys.stdin, replies)


if __name__ == "__main__":
    main()
