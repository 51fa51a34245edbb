"""Converts official Open-Sora-Plan 1.3 weights to a safetensors folder that loads at once, part by part.

    python -m tools.convert_open_sora_plan --weights Open-Sora-Plan-v1.3.0 --text-encoder mt5-xxl --output osp

The pickles are read without running anything in them, one tensor at a time; the mT5 decoder and the constant wavelet
filters are left out. Every tensor is checked against the models before anything is written.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from pipelines.models.open_sora_plan_layout import CheckpointFolders, find_folders
from pipelines.models.open_sora_plan_loading import (
    DIFFUSERS_STEM,
    TEXT_ALIAS,
    Source,
    check_exact,
    empty_text_encoder,
    empty_transformer,
    empty_vae,
    is_kept_fp32,
    load_tokenizer,
    open_tensors,
    open_text_encoder_tensors,
    open_vae_tensors,
)

DTYPES = {"keep": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_SHARD_BYTES = 5 * 10**9


def convert(
    folders: CheckpointFolders, output: Path, dtype: torch.dtype | None = None, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Path:
    """Write `transformer`, `vae`, `text_encoder` and `tokenizer` below `output`.

    Args:
        folders: where the official parts lie.
        output: folder to create; may exist if empty.
        dtype: of the written tensors, None for that of each file. In fp16 the `wo` of mT5 stay in fp32.
        shard_bytes: largest size of one file, and of host memory taken.
    Returns:
        `output`.
    Raises:
        ValueError: a part that is not exactly what its model needs.
        FileExistsError: `output` is a file, or a folder that is not empty.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be at least 1, nearest is 1")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"output={str(output)!r} exists and is not an empty directory; nothing was written")
    transformer_tensors = open_tensors(folders.transformer, (DIFFUSERS_STEM,))
    vae_tensors = open_vae_tensors(folders.vae)
    text_tensors = open_text_encoder_tensors(folders.text_encoder)
    transformer = empty_transformer(folders.transformer)
    vae = empty_vae(folders.vae, vae_tensors)
    text_encoder = empty_text_encoder(folders.text_encoder)
    check_exact(transformer_tensors, transformer, folders.transformer)
    check_exact(vae_tensors, vae, folders.vae)
    check_exact(text_tensors, text_encoder, folders.text_encoder, (TEXT_ALIAS,))
    tokenizer = load_tokenizer(folders.tokenizer)

    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        for name, model, tensors in (("transformer", transformer, transformer_tensors), ("vae", vae, vae_tensors)):
            write_tensors(part / name, DIFFUSERS_STEM, tensors, dtype, shard_bytes)
            model.save_config(part / name)
        write_tensors(part / "text_encoder", "model", text_tensors, dtype, shard_bytes)
        text_encoder.config.architectures = ["MT5EncoderModel"]
        text_encoder.config.save_pretrained(part / "text_encoder")
        tokenizer.save_pretrained(part / "tokenizer")
        index = {
            "_class_name": "OpenSoraPlanPipeline",
            "text_encoder": ["transformers", "MT5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["pipelines.models.open_sora_plan", "OpenSoraPlanTransformer3DModel"],
            "vae": ["pipelines.models.wf_vae", "WFVAEModel"],
        }
        _write_json(part / "model_index.json", index)
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output


def write_tensors(
    folder: Path, stem: str, sources: Mapping[str, Source], dtype: torch.dtype | None, shard_bytes: int
) -> None:
    """Write `stem.safetensors`, or shards of at most `shard_bytes` with an index; holds one shard in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0
    for key, source in sources.items():
        value = source.read()
        wanted = value.dtype if dtype is None else torch.float32 if is_kept_fp32(key, dtype) else dtype
        value = value.to(wanted, copy=True).contiguous()
        if shard and size + value.nbytes > shard_bytes:
            files.append(_write_shard(folder, stem, len(files), shard))
            shard, size = {}, 0
        shard[key] = value
        size += value.nbytes
        total += value.nbytes
    files.append(_write_shard(folder, stem, len(files), shard))
    if len(files) == 1:
        files[0][0].rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, (path, keys) in enumerate(files):
        name = f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_shard(folder: Path, stem: str, index: int, shard: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = folder / f"{stem}.part{index}"
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(folder.stat().st_mode & 0o666)  # safetensors lets only the owner read
    return path, list(shard)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    weights: Annotated[Path, typer.Option(help="folder with any93x640x640/ and vae/")],
    output: Annotated[Path, typer.Option(help="folder to create")],
    text_encoder: Annotated[Path | None, typer.Option(help="folder of mt5-xxl, if not below weights")] = None,
    dtype: Annotated[str, typer.Option(help=f"of the written tensors: {', '.join(DTYPES)}")] = "keep",
    shard_gb: Annotated[float, typer.Option(help="largest size of one file in GB")] = 5.0,
) -> None:
    """Convert official Open-Sora-Plan 1.3 weights to safetensors."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is unknown, known are: {', '.join(DTYPES)}", param_hint="--dtype")
    try:
        convert(find_folders(weights, text_encoder), output, DTYPES[dtype], int(shard_gb * 1e9))
    except (ValueError, FileExistsError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    typer.echo(f"{output} ({size / 1e9:.2f} GB)")


if __name__ == "__main__":
    app()
