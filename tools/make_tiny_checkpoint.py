"""Tiny random checkpoints of the real model classes, in diffusers' directory layout, for tests, demo and benchmarks."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from tools.tiny_open_sora_plan import make_open_sora_plan
from tools.tiny_weights import Scale, fan_in, fill, without_progress_bars

LLAMA_BOS, LLAMA_EOS, LLAMA_PAD = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
LLAMA_SPECIAL = (LLAMA_BOS, LLAMA_EOS, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", LLAMA_PAD)
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"

# Where Llama 3's tokenizer cuts a text before it merges bytes: contractions, words, numbers of up to three digits,
# punctuation, line breaks, spaces. The template has 94 such pieces; with every piece one token and BOS that makes 95.
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Besides the template, so that common prompts take about one token a word.
VOCABULARY_TEXT = (
    "A red fox crosses a frozen river at dawn. The camera follows a small blue boat on a stormy sea.",
    "Two green circles move left while a yellow square moves right. White clouds drift over a quiet city at night.",
    "An old man walks up a narrow street in the rain. A black cat sleeps on a warm orange sofa, slow zoom in.",
    "Close shot of a purple triangle, still, on a gray background. Cinematic light, high detail, realistic.",
)


def make_hunyuan_video(
    output: Path,
    *,
    seed: int = 0,
    heads: int = 4,
    head_dim: int | None = None,
    num_layers: int = 2,
    num_single_layers: int = 2,
    mlp_ratio: float = 2.0,
    vae_channels: Sequence[int] = (4, 4, 8, 8),
) -> Path:
    """Write a tiny random HunyuanVideo checkpoint that `diffusers.HunyuanVideoPipeline.from_pretrained` reads.

    The classes, the sub-directories and the strides are those of `hunyuanvideo-community/HunyuanVideo`: 16 latent
    channels, VAE stride 4 x 8 x 8, patch 1 x 2 x 2, embedded guidance, flow matching with shift 7. Only widths and
    depths shrink. The same arguments give the same bytes; weights are float32.

    `model_index.json` names `PreTrainedTokenizerFast` for the Llama tokenizer: `LlamaTokenizerFast` of transformers 5
    replaces the byte-level pre-tokenizer of the file and would cut the prompt template at the wrong token.

    Args:
        output: directory to create; may exist if empty.
        seed: of all weights, 0 or more.
        heads: attention heads N of the transformer.
        head_dim: D of a head, even and at least 6. None: 16, or 8 above 8 heads, which keeps 24 heads small.
        num_layers: dual-stream blocks.
        num_single_layers: single-stream blocks.
        mlp_ratio: hidden width of the blocks' MLPs in units of N*D (the real model has 4).
        vae_channels: the VAE's four block widths, each even; decoding takes most of the time of a small clip.
    Returns:
        `output`.
    Raises:
        ValueError: an argument out of range.
        FileExistsError: `output` is a file, or a directory that is not empty.
    """
    dim = head_dim if head_dim is not None else (16 if heads <= 8 else 8)
    for name, value, least in (
        ("seed", seed, 0),
        ("heads", heads, 1),
        ("num_layers", num_layers, 1),
        ("num_single_layers", num_single_layers, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}, nearest is {least}")
    if dim < 6 or dim % 2:
        raise ValueError(f"head_dim={dim} must be even and at least 6, nearest is {max(6, dim + dim % 2)}")
    if len(vae_channels) != 4 or any(c < 2 or c % 2 for c in vae_channels):
        near = tuple(max(2, c + c % 2) for c in (*vae_channels, *[8] * 4)[:4])
        raise ValueError(f"vae_channels={tuple(vae_channels)} must be four even widths, nearest is {near}")
    if mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio={mlp_ratio} must be positive, nearest is 1.0")

    tokenizer = _llama_tokenizer()
    tokenizer_2 = _clip_tokenizer()
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,  # hidden_states[-3] is read: the first two matter
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
    )
    text_encoder_2 = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer_2),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer_2.bos_token_id,
            eos_token_id=tokenizer_2.eos_token_id,
            pad_token_id=tokenizer_2.pad_token_id,
        )
    )
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=dim,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        num_refiner_layers=1,
        mlp_ratio=mlp_ratio,
        text_embed_dim=64,
        pooled_projection_dim=32,
        rope_axes_dim=_rope_axes(dim),
    )
    vae = AutoencoderKLHunyuanVideo(block_out_channels=tuple(vae_channels), norm_num_groups=2)

    fill(text_encoder, "text_encoder", seed, _text_scale)
    fill(text_encoder_2, "text_encoder_2", seed, _text_scale)
    fill(transformer, "transformer", seed, _transformer_scale)
    fill(vae, "vae", seed, _vae_scale)

    pipe = HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
    return _write(pipe, output, {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]})


MODELS: dict[str, Callable[..., Path]] = {
    "hunyuan-video": make_hunyuan_video,
    "open-sora-plan": make_open_sora_plan,
}


def _write(pipe: Any, output: Path, index_overrides: dict[str, Any]) -> Path:
    """Save `pipe` in a directory beside `output`, then rename it: a reader sees all of it or nothing."""
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"output={str(output)!r} exists and is not an empty directory; nothing was written")
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with without_progress_bars():
            pipe.save_pretrained(part, safe_serialization=True)
        index_file = part / "model_index.json"
        index = json.loads(index_file.read_text()) | index_overrides
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output


# --- weights ---------------------------------------------------------------------------------------------------------


def _text_scale(name: str, parameter: torch.Tensor) -> Scale:
    if name.endswith("bias"):
        return 0.0, 0.1
    if parameter.ndim == 1:
        return 1.0, 0.1
    if "embed_tokens" in name or "token_embedding" in name:
        return 0.0, 1.0
    if "position_embedding" in name:
        return 0.0, 0.5
    return 0.0, 1.5 / math.sqrt(fan_in(parameter))


def _transformer_scale(name: str, parameter: torch.Tensor) -> Scale:
    """Every branch about as large as the residual stream, and a velocity of about unit deviation at every step.

    The last layer sees a normalised stream, so its scale alone fixes the velocity: the integral over sigma 1..0 of a
    unit velocity changes unit noise by about its own size, whatever the number of steps.
    """
    if name.endswith("bias"):
        return 0.0, 0.3 if "norm" in name else 0.1
    if parameter.ndim == 1:  # sharper attention through the query and key norms: masks and key order must bite
        if "norm_added_k" in name:  # a few text tokens among many of video: they too must draw attention
            return 2.5, 0.1
        return (1.5, 0.1) if "attn.norm" in name else (1.0, 0.1)
    inputs = fan_in(parameter)
    if "norm" in name:  # adaLN: shifts, scales and gates of about 0.5, none of them zero
        return 0.0, 0.7 / math.sqrt(inputs)
    if name == "proj_out.weight":
        return 0.0, 1.0 / math.sqrt(inputs)
    return 0.0, 1.4 / math.sqrt(inputs)


def _vae_scale(name: str, parameter: torch.Tensor) -> Scale:
    """Residual branches as large as the stream; decoded pixels of about 0.5 deviation in [-1, 1]."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if parameter.ndim == 1:
        return 1.0, 0.1
    inputs = fan_in(parameter)
    if name.startswith("decoder.conv_out"):
        return 0.0, 0.8 / math.sqrt(inputs)
    if ".conv1." in name or ".conv2." in name:  # after SiLU, whose root mean square is about 0.6
        return 0.0, 1.6 / math.sqrt(inputs)
    return 0.0, 1.0 / math.sqrt(inputs)


def _rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Rotary dims of time, rows and columns: even, rows and columns 3/8 of the head each, time the rest."""
    side = max(2, head_dim * 3 // 8 // 2 * 2)
    return head_dim - 2 * side, side, side


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of Llama 3's form, in which the prompt template up to the prompt has `crop_start` tokens."""
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    parts = [template]
    for token in LLAMA_SPECIAL:  # special tokens are no text to merge
        parts = [piece for part in parts for piece in part.split(token)]
    tokenizer.train_from_iterator([*parts, *VOCABULARY_TEXT], _trainer())
    tokenizer.add_special_tokens(list(LLAMA_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{LLAMA_BOS} $A",
        pair=f"{LLAMA_BOS} $A {LLAMA_BOS} $B",
        special_tokens=[(LLAMA_BOS, tokenizer.token_to_id(LLAMA_BOS))],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=LLAMA_BOS,
        eos_token=LLAMA_EOS,
        pad_token=LLAMA_PAD,
        padding_side="right",
        model_max_length=1024,
    )
    prefix = fast(template.split("{}")[0]).input_ids
    crop = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    assert len(prefix) == crop, f"the template prefix has {len(prefix)} tokens, the pipeline cuts {crop}"
    return fast


def _clip_tokenizer() -> CLIPTokenizer:
    """A BPE of CLIP's form: lower case, end-of-word suffix, start and end tokens last in the vocabulary."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    ends = [f"{letter}</w>" for letter in sorted(pre_tokenizers.ByteLevel.alphabet())]
    trainer = _trainer(end_of_word_suffix="</w>", special_tokens=ends)
    tokenizer.train_from_iterator([text.lower() for text in VOCABULARY_TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for token in (CLIP_BOS, CLIP_EOS):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)


def _trainer(**options: Any) -> trainers.BpeTrainer:
    """Learns merges until every word is one token; all bytes are in the vocabulary, so no text is unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trainers.BpeTrainer(
        vocab_size=8192, min_frequency=1, initial_alphabet=alphabet, show_progress=False, **options
    )


# --- command line ----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help=f"one of: {', '.join(MODELS)}")],
    output: Annotated[Path, typer.Option(help="directory to create")],
    seed: Annotated[int, typer.Option(help="seed of all weights")] = 0,
    heads: Annotated[int | None, typer.Option(help="attention heads of the transformer")] = None,
) -> None:
    """Write a tiny random checkpoint of a model's real classes."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is unknown, known are: {', '.join(MODELS)}", param_hint="--model")
    try:
        path = MODELS[model](output, seed=seed, **({} if heads is None else {"heads": heads}))
    except (ValueError, FileExistsError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    typer.echo(f"{model}: {path} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    app()
