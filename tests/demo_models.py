"""Tiny untrained pipelines in the layout of the bundled models, whose output still depends on everything."""

from pathlib import Path

import torch

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
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    pipe = build_pipeline(
        vae=build_vae("tiny"), transformer=dit, llama=llama, clip=clip, tokenizer=tokenizer, tokenizer_2=tokenizer_2
    )
    export_pipeline(pipe, out, torch.bfloat16, "test\n")
    return out
