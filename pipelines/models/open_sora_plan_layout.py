"""Where the parts of an Open-Sora-Plan checkpoint lie, which step counts its sampler knows, its VAE's strides: no
tensors needed."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TRANSFORMER_FOLDERS = ("transformer", "any93x640x640")
VAE_FOLDERS = ("vae",)
TEXT_ENCODER_FOLDERS = ("text_encoder", "mt5-xxl", "google/mt5-xxl")
TOKENIZER_FOLDERS = ("tokenizer", *TEXT_ENCODER_FOLDERS)
STRIDE_T = 4  # frames in a latent frame, but for the first
STRIDE_S = 8  # px in a latent row or column
DEFAULT_DECODE_CHUNK = 4  # latent frames
MAX_STEPS = 285  # more would take a step up in sigma near the start: NaN


@dataclass(frozen=True, kw_only=True)
class CheckpointFolders:
    """Where the parts of a checkpoint lie."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path


def find_folders(weights: Path, text_encoder: Path | None = None) -> CheckpointFolders:
    """The parts of a checkpoint below `weights`; `text_encoder` where mT5 lies elsewhere (it has its own repository).

    Raises:
        ValueError: a part is not there; names the folders that were tried.
    """
    encoders = [text_encoder] if text_encoder else _below(weights, TEXT_ENCODER_FOLDERS)
    tokenizers = [text_encoder] if text_encoder else _below(weights, TOKENIZER_FOLDERS)
    return CheckpointFolders(
        transformer=_first("transformer", _below(weights, TRANSFORMER_FOLDERS), "config.json"),
        vae=_first("vae", _below(weights, VAE_FOLDERS), "config.json"),
        text_encoder=_first("text_encoder", encoders, "config.json"),
        tokenizer=_first("tokenizer", tokenizers, "tokenizer.json", "spiece.model"),
    )


def check_steps(num_inference_steps: int, where: str = "") -> None:
    """Refuse a number of steps that cannot be sampled.

    Raises:
        ValueError: names the value and the nearest valid one.
    """
    near = min(max(num_inference_steps, 1), MAX_STEPS)
    if num_inference_steps != near:
        raise ValueError(
            f"{where}num_inference_steps={num_inference_steps} must be between 1 and {MAX_STEPS}, nearest is {near}"
        )


def _below(root: Path, names: Iterable[str]) -> list[Path]:
    return [root / name for name in names]


def _first(part: str, folders: Iterable[Path], *files: str) -> Path:
    folders = list(folders)
    for folder in folders:
        if any((folder / file).is_file() for file in files):
            return folder
    raise ValueError(f"{part}: none of {', '.join(map(str, folders))} holds {' or '.join(files)}")
