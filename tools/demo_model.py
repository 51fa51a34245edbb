"""The demo model's parts: real HunyuanVideo classes at small sizes, their tokenizers, latent whitening, and export.

The exported directory is an ordinary `diffusers.HunyuanVideoPipeline` directory and needs no special arguments:
the tokenizer gives the default chat template the 95 tokens that the pipeline cuts, and the embedded guidance is
trained to nothing (its last layer is zero), so any `guidance_scale` gives the same clip.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from tools.moving_shapes import caption, scene_at

MAX_BYTES = 25_000_000
TRAINING = "training.json"  # in an exported directory: recipe, iterations, seconds, what the VAE scored
SHIFT = 2.0  # of the flow-matching schedule; training draws its noise levels to match
TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]
CROP_START: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]
TEXT_TOKENS = 32  # caption tokens kept in training; no caption of the grammar is longer

VaeSize = Literal["tiny", "small", "wide", "stock"]
DitSize = Literal["tiny", "base"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeShape:
    """Sizes of an AutoencoderKLHunyuanVideo that compresses 4x in time and 8x in space."""

    channels: tuple[int, ...]
    groups: int
    latent_channels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DitShape:
    """Sizes of a HunyuanVideoTransformer3DModel and of its two text encoders."""

    heads: int
    head_dim: int
    rope: tuple[int, int, int]
    dual_blocks: int
    single_blocks: int
    text_width: int


# Three blocks compress in all three; the stock layout's fourth keeps resnets at full resolution and costs twice.
VAE_SHAPES: dict[VaeSize, VaeShape] = {
    "tiny": VaeShape(channels=(8, 8, 8), groups=2, latent_channels=4),
    "small": VaeShape(channels=(16, 32, 64), groups=4, latent_channels=16),
    "wide": VaeShape(channels=(24, 48, 96), groups=4, latent_channels=16),
    "stock": VaeShape(channels=(16, 32, 64, 64), groups=4, latent_channels=16),
}
# Twelve heads: 5, 7 and 8 ranks do not divide them.
DIT_SHAPES: dict[DitSize, DitShape] = {
    "tiny": DitShape(heads=6, head_dim=8, rope=(4, 2, 2), dual_blocks=1, single_blocks=1, text_width=16),
    "base": DitShape(heads=12, head_dim=16, rope=(4, 6, 6), dual_blocks=2, single_blocks=4, text_width=128),
}


def build_vae(size: VaeSize) -> AutoencoderKLHunyuanVideo:
    """A fresh VAE that begins as an average-pool encoder and a nearest-neighbour decoder, posterior log-variance -6.

    Residual branches start at zero, strided convolutions as box averages, the ones after upsampling as copies, and
    the rest of the main path keeps the variance. torch's default initialisation shrinks the signal about 0.6x per
    convolution, and training then stays at a flat picture (13 dB on crops after 200 iterations, against 19 dB).
    """
    shape = VAE_SHAPES[size]
    blocks = len(shape.channels)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=shape.latent_channels,
        block_out_channels=shape.channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * blocks,
        up_block_types=("HunyuanVideoUpBlock3D",) * blocks,
        layers_per_block=1,
        norm_num_groups=shape.groups,
        scaling_factor=1.0,  # latents are whitened per channel instead
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, nn.Conv3d):
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            each = torch.arange(module.out_channels)
            if ".conv2." in name:
                nn.init.zeros_(module.weight)
            elif "downsamplers" in name:
                nn.init.zeros_(module.weight)
                module.weight[each, each, 1:, 1:, 1:] = 1 / 8
            elif "upsamplers" in name:
                nn.init.zeros_(module.weight)
                module.weight[each, each, -1, 1, 1] = 1  # causal in time: the last tap is now
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if ".conv1." in name else "linear")
        vae.quant_conv.weight[shape.latent_channels :].zero_()
        vae.quant_conv.bias[shape.latent_channels :].fill_(-6.0)
    return vae


def build_transformer(size: DitSize, latent_channels: int) -> HunyuanVideoTransformer3DModel:
    """A fresh DiT: modulation and output start at zero, the guidance embedding stays there (not trainable)."""
    shape = DIT_SHAPES[size]
    dit = HunyuanVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        num_layers=shape.dual_blocks,
        num_single_layers=shape.single_blocks,
        num_refiner_layers=1,
        text_embed_dim=shape.text_width,
        pooled_projection_dim=shape.text_width,
        rope_axes_dim=shape.rope,
    )
    zeroed: list[nn.Linear] = [dit.proj_out, dit.norm_out.linear, dit.time_text_embed.guidance_embedder.linear_2]
    for block in dit.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    zeroed += [block.norm.linear for block in dit.single_transformer_blocks]
    for module in zeroed:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    dit.time_text_embed.guidance_embedder.requires_grad_(False)
    return dit


def build_text_encoders(
    size: DitSize, tokenizer: PreTrainedTokenizerFast, tokenizer_2: PreTrainedTokenizerFast
) -> tuple[LlamaModel, CLIPTextModel]:
    """Fresh encoders. The pipeline reads the Llama two layers before its end, so two of its four layers do the work."""
    width = DIT_SHAPES[size].text_width
    heads = max(1, width // 32)
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer_2),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=77,
            bos_token_id=tokenizer_2.bos_token_id,
            eos_token_id=tokenizer_2.eos_token_id,  # never 2: that id selects CLIP's legacy pooling
            pad_token_id=tokenizer_2.pad_token_id,
        )
    )
    return llama, clip


# --- tokenizers ---------------------------------------------------------------------------------------------------

# A word with the one space or sign before it; single digits; runs of signs; line ends; other blanks.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def _byte_level_bpe(corpus: Iterable[str], special: Sequence[str], vocab_size: int, *, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def build_tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Byte-level BPE tokenizers for the Llama and the CLIP slot, trained on the captions and the chat template.

    Any UTF-8 text is accepted. The template's words become single tokens, so that its prefix has the CROP_START
    tokens that the pipeline cuts away.
    Raises:
        RuntimeError: the prefix came out at another length (a tokenizers release that trains differently).
    """
    rng = np.random.default_rng(0)
    captions = [caption(scene_at(0, i, split="any"), rng, omit=0.1) for i in range(4000)]
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
    pieces = [p for p in _split_on(TEMPLATE.split("{}")[0], specials) if p]  # as the tokenizer will see them
    llama = _byte_level_bpe([*captions, *pieces * 100], specials, 900, lowercase=False)
    bos = llama.token_to_id("<|begin_of_text|>")
    llama.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        padding_side="right",
        model_max_length=512,
    )
    prefix = len(tokenizer(TEMPLATE.split("{}")[0]).input_ids)
    if prefix != CROP_START:
        raise RuntimeError(f"the template's prefix has {prefix} tokens, the pipeline cuts {CROP_START}")

    ends = ["<|unused_0|>", "<|unused_1|>", "<|unused_2|>", "<|startoftext|>", "<|endoftext|>"]
    clip = _byte_level_bpe(captions, ends, 500, lowercase=True)
    clip.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(token, clip.token_to_id(token)) for token in ends[3:]],
    )
    tokenizer_2 = PreTrainedTokenizerFast(
        tokenizer_object=clip,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        model_max_length=77,
    )
    return tokenizer, tokenizer_2


def _split_on(text: str, separators: Sequence[str]) -> list[str]:
    pieces = [text]
    for separator in separators:
        pieces = [part for piece in pieces for part in piece.split(separator)]
    return pieces


def tokenize(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_2: PreTrainedTokenizerFast,
    *,
    same_length: bool = False,
) -> dict[str, Tensor]:
    """Ids and masks as the pipeline makes them, padded to the longest prompt instead of 256 and 77 places.

    Both encoders are causal, so what follows a prompt's last token cannot change what is read of it.

    Args:
        same_length: always TEXT_TOKENS for the DiT, so that all batches have the same shape.
    Returns:
        ids and mask int64 [B, CROP_START + L], L at most TEXT_TOKENS, for the Llama; ids_2 int64 [B, L2] for CLIP.
    """
    first = tokenizer(
        [TEMPLATE.format(p) for p in prompts],
        max_length=CROP_START + TEXT_TOKENS,
        padding="max_length" if same_length else "longest",
        truncation=True,
        return_tensors="pt",
    )
    second = tokenizer_2(list(prompts), max_length=77, padding="longest", truncation=True, return_tensors="pt")
    return {"ids": first.input_ids, "mask": first.attention_mask, "ids_2": second.input_ids}


def encode_text(llama: LlamaModel, clip: CLIPTextModel, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Text as the pipeline hands it to the DiT. The template's prefix, the same for all prompts, is computed once.

    Returns:
        Embeddings [B, L, C], mask [B, L] with L as in `tokenize`, and the pooled embedding [B, C].
    """
    ids, mask = tokens["ids"], tokens["mask"]
    prefix = llama(input_ids=ids[:1, :CROP_START], use_cache=True).past_key_values
    prefix.batch_repeat_interleave(len(ids))
    states = llama(
        input_ids=ids[:, CROP_START:], attention_mask=mask, past_key_values=prefix, output_hidden_states=True
    ).hidden_states
    pooled = clip(tokens["ids_2"]).pooler_output
    return states[-3], mask[:, CROP_START:], pooled


# --- whitening ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_whitening(vae: AutoencoderKLHunyuanVideo, mean: Tensor, std: Tensor) -> None:
    """Change the VAE in place so that its latents become (z - mean) / std and its decoder takes those.

    Exact, since `quant_conv` and `post_quant_conv` are 1x1x1: reconstructions stay the same up to rounding.

    Args:
        mean, std: [C] of the latents that the VAE gives now.
    Raises:
        ValueError: a std that is not positive.
    """
    if not bool((std > 0).all()):
        raise ValueError(f"std={std.min().item()} of a latent channel must be positive: the channel carries nothing")
    channels = std.numel()
    into, back = vae.quant_conv, vae.post_quant_conv
    mean, std = mean.to(into.weight), std.to(into.weight)
    into.weight[:channels] /= std.view(-1, 1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()  # the second half is the log-variance
    back.bias += back.weight.flatten(1) @ mean
    back.weight *= std.view(1, -1, 1, 1, 1)


# --- the pipeline directory -----------------------------------------------------------------------------------------


def build_pipeline(
    *,
    vae: AutoencoderKLHunyuanVideo,
    transformer: HunyuanVideoTransformer3DModel,
    llama: LlamaModel,
    clip: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_2: PreTrainedTokenizerFast,
) -> HunyuanVideoPipeline:
    """The parts as diffusers' pipeline, with the schedule they were trained for."""
    pipe = HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder_2=clip,
        tokenizer_2=tokenizer_2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export_pipeline(
    pipe: HunyuanVideoPipeline, out: Path, dtype: torch.dtype, card: str, training: Mapping[str, Any]
) -> int:
    """Write the pipeline directory (safetensors in `dtype`, README.md, TRAINING) and return its size in bytes.

    The pipeline's weights are rounded in place. The directory appears complete or not at all.
    Raises:
        ValueError: larger than MAX_BYTES, or `out` exists and is no pipeline directory.
    """

    def write(folder: Path) -> None:
        pipe.to(dtype)
        pipe.save_pretrained(folder, safe_serialization=True)
        index_file = folder / "model_index.json"
        index = json.loads(index_file.read_text())
        for name in ("tokenizer", "tokenizer_2"):  # the one class name that transformers 4 and 5 both load as it is
            index[name] = ["transformers", "PreTrainedTokenizerFast"]
        index_file.write_text(json.dumps(index, indent=2) + "\n")

    return export_directory(write, out, dtype, card, training, MAX_BYTES)


def export_directory(
    write: Callable[[Path], None],
    out: Path,
    dtype: torch.dtype,
    card: str,
    training: Mapping[str, Any],
    max_bytes: int,
) -> int:
    """Write a pipeline directory with README.md and TRAINING, complete or not at all, and return its size in bytes.

    Args:
        write: puts everything else into the empty folder that it is given, weights in `dtype`.
    Raises:
        ValueError: larger than max_bytes, or `out` exists and is no pipeline directory.
    """
    if out.exists() and not (out / "model_index.json").is_file():
        raise ValueError(f"out={str(out)!r} exists and holds no model_index.json: choose a new directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(temporary)
        (temporary / "README.md").write_text(card)
        (temporary / TRAINING).write_text(json.dumps(training, indent=1) + "\n")
        files = [f for f in temporary.rglob("*") if f.is_file()]
        for file in files:
            file.chmod(0o644)
        size = sum(f.stat().st_size for f in files)
        if size > max_bytes:
            raise ValueError(f"the pipeline has {size} bytes in {dtype}, more than {max_bytes}: choose smaller sizes")
        temporary.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def num_parameters(*modules: nn.Module) -> int:
    """Parameters of all modules together."""
    return sum(math.prod(p.shape) for module in modules for p in module.parameters())
