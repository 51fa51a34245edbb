"""Tiny untrained pipelines in the layout of the bundled models, whose output still depends on everything."""

from pathlib import Path

import torch
from torch import nn

from pipelines.models.open_sora_plan_loading import load_tokenizer
from pipelines.open_sora_plan import OpenSoraPlanParts
from tools import demo_open_sora_plan as plan
from tools.demo_model import (
    build_pipeline,
    build_text_encoders,
    build_tokenizers,
    build_transformer,
    build_vae,
    export_pipeline,
)


def tiny_moving_shapes(out: Path) -> Path:
    """A HunyuanVideo pipeline directory without zero weights; `out` must not exist."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = build_tokenizers()
    llama, clip = build_text_encoders("tiny", tokenizer, tokenizer_2)
    dit = build_transformer("tiny", 4)
    _fill_zeros(dit)
    pipe = build_pipeline(
        vae=build_vae("tiny"), transformer=dit, llama=llama, clip=clip, tokenizer=tokenizer, tokenizer_2=tokenizer_2
    )
    export_pipeline(pipe, out, torch.bfloat16, "test\n", {})
    return out


def tiny_open_sora_plan(out: Path) -> Path:
    """An Open-Sora-Plan pipeline directory without zero weights; `out` must not exist."""
    torch.manual_seed(0)
    folder = out.with_name(f"{out.name}-tokenizer")
    plan.write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    dit, vae = plan.build_transformer("tiny", 8), plan.build_vae("tiny")
    _fill_zeros(dit)
    _fill_zeros(vae.decoder)
    text_encoder = plan.build_text_encoder("tiny", len(tokenizer))
    parts = OpenSoraPlanParts(tokenizer=tokenizer, text_encoder=text_encoder, transformer=dit, vae=vae)
    plan.export_parts(parts, folder / "spiece.model", out, torch.bfloat16, "test\n", {})
    return out


def _fill_zeros(module: nn.Module) -> None:
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
