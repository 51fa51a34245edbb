"""The records that flow from a prompt to a finished clip: frozen, keyword-only, validated where they enter."""

import re
from typing import Any, Literal

import msgspec

from videopipe.geometry import VideoSpec

OutputFormat = Literal["mp4", "png", "npy", "latent"]

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class VideoRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One clip to render.

    `id` names the files of the result, so it holds only letters, digits, dot, dash and underscore.
    `guidance_scale` is the embedded guidance of distilled models (HunyuanVideo) or the CFG scale of others;
    `true_cfg_scale` above 1 with a `negative_prompt` adds a second, unconditional branch (diffusers' name).
    `seed` seeds a CPU generator of this request alone: the noise is the same on any number of ranks.
    """

    id: str
    prompt: str
    negative_prompt: str | None = None
    spec: VideoSpec
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    true_cfg_scale: float = 1.0
    seed: int = 0
    max_sequence_length: int = 256

    def check(self, where: str = "") -> None:
        """Refuse what no model can render.

        Raises:
            ValueError: names the field, the value and the nearest valid value.
        """
        if not _ID.fullmatch(self.id):
            near = safe_id(self.id)
            raise ValueError(
                f"{where}id={self.id!r} must be 1 to 128 letters, digits, '.', '-', '_' and not start with "
                f"'.' or '-', nearest is {near!r}"
            )
        if self.num_inference_steps < 1:
            raise ValueError(f"{where}num_inference_steps={self.num_inference_steps} must be at least 1, nearest is 1")
        if not 0 <= self.seed < 2**63:
            near_seed = 0 if self.seed < 0 else 2**63 - 1
            raise ValueError(f"{where}seed={self.seed} must be between 0 and 2**63 - 1, nearest is {near_seed}")
        if self.max_sequence_length < 1:
            raise ValueError(f"{where}max_sequence_length={self.max_sequence_length} must be at least 1, nearest is 1")


class StageTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that one rank spent in one stage of one request; rank -1 is the caller's process, which writes files."""

    stage: str
    rank: int
    seconds: float


class SideCar(msgspec.Struct, frozen=True, kw_only=True):
    """What lies beside every finished clip as `<id>.json`: enough to render it again and to compare two runs.

    `frames_sha256` hashes shape and bytes of the uint8 frames [T, H, W, 3] before encoding, None for latent output;
    `latents_sha256` likewise for latent output. `peak_memory_bytes` is by rank: device memory on CUDA, resident host
    memory on CPU.
    """

    request: VideoRequest
    output: str
    format: OutputFormat
    frames_sha256: str | None
    latents_sha256: str | None = None
    versions: dict[str, str]
    plan: dict[str, Any]
    config: dict[str, Any]
    stages: tuple[StageTime, ...]
    queue_wait_s: float
    total_s: float
    peak_memory_bytes: dict[str, int]
    finished_at: str


def safe_id(text: str, limit: int = 128) -> str:
    """The nearest valid request id to `text`; never empty."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:limit].rstrip("-.")
    return cleaned or "clip"


def default_id(index: int, prompt: str, seed: int) -> str:
    """`00003-a-red-fox-crossing-0`: stable for the same list of prompts, free of collisions within it."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{index:05d}-{slug or 'clip'}-{seed}"
