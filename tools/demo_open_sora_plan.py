"""The second demo model's parts: Open-Sora-Plan's classes at small sizes, a tokenizer of its captions, and export.

The exported directory has the layout of `tools/convert_open_sora_plan.py`, which `OpenSoraPlanPipeline` loads.
"""

import json
import math
import shutil
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MT5Config, MT5EncoderModel, PreTrainedTokenizerBase

from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel
from pipelines.models.open_sora_plan_loading import DIFFUSERS_STEM, TEXT_ALIAS, Source
from pipelines.models.spiece import PieceKind
from pipelines.models.wf_vae import WFVAEModel
from pipelines.models.wf_vae_layers import (
    Downsample,
    ResnetBlock2D,
    ResnetBlock3D,
    SpatialAttention,
    Stream,
    TimeDownsample,
    TimeUpsample,
    Upsample,
)
from pipelines.open_sora_plan import NEGATIVE_PROMPT, PROMPT_TEMPLATE, OpenSoraPlanParts
from tools.convert_open_sora_plan import write_tensors
from tools.demo_model import DitSize, VaeSize, export_directory
from tools.moving_shapes import caption, scene_at
from tools.tiny_open_sora_plan import write_spiece

MAX_BYTES = 15_000_000
TEXT_TOKENS = 56  # no caption in its template, and not the negative prompt, is longer
# of an mT5 attention's logits at the start of training: per word of distance, and for words on the other side
_NEAR, _ONE_SIDE, _OTHER_SIDE = 0.5, 0.25, -6.0
_LETTER_SCORE = -20.0  # far below any word: a known word is never spelt


@dataclass(frozen=True, kw_only=True, slots=True)
class WfVaeShape:
    """Sizes of a WFVAEModel, which compresses 4x in time and 8x in space: widths c, 2c, 4c, and of the energy flow."""

    base_channels: int
    flow_channels: int
    latent_channels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanDitShape:
    """Sizes of an OpenSoraPlanTransformer3DModel and of its mT5; blocks from the third on are sparse."""

    heads: int
    head_dim: int
    blocks: int
    text_width: int


VAE_SHAPES: dict[VaeSize, WfVaeShape] = {
    "tiny": WfVaeShape(base_channels=4, flow_channels=4, latent_channels=8),
    "small": WfVaeShape(base_channels=16, flow_channels=8, latent_channels=16),
}
# Twelve heads: 5, 7 and 8 ranks do not divide them. Two dense blocks, then both patterns of sparse ones in turn.
DIT_SHAPES: dict[DitSize, PlanDitShape] = {
    "tiny": PlanDitShape(heads=6, head_dim=6, blocks=4, text_width=16),
    "base": PlanDitShape(heads=12, head_dim=18, blocks=6, text_width=128),
}


def build_vae(size: VaeSize) -> WFVAEModel:
    """A fresh WF-VAE that begins as averages and copies: residual branches at zero, posterior log-variance -6.

    Both connections of the energy flow begin as they are, so that the lowest bands reach the latents and come back;
    the pictures' higher bands begin at zero.
    """
    shape = VAE_SHAPES[size]
    vae = WFVAEModel(
        latent_dim=shape.latent_channels,
        base_channels=shape.base_channels,
        encoder_num_resblocks=1,
        decoder_num_resblocks=1,
        encoder_energy_flow_hidden_size=shape.flow_channels,
        decoder_energy_flow_hidden_size=shape.flow_channels,
        norm_type="layernorm",
        t_interpolation="trilinear",
        connect_res_layer_num=1,
        scale=(1.0,) * shape.latent_channels,
        shift=(0.0,) * shape.latent_channels,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                assert module.bias is not None
                nn.init.zeros_(module.bias)
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if ".conv1" in name else "linear")
        for module in vae.modules():
            _begin_simple(module)
        nn.init.zeros_(vae.decoder.conv_out.weight)
        nn.init.zeros_(_last_conv(vae.decoder.connect_l1).weight)
        moments = vae.encoder.conv_out.conv
        assert moments.bias is not None
        moments.weight[shape.latent_channels :].zero_()
        moments.bias[shape.latent_channels :].fill_(-6.0)
    return vae


def _begin_simple(module: nn.Module) -> None:
    """Residual branches at zero, strided convolutions as averages of what they cover, the others beside them copies."""
    if isinstance(module, ResnetBlock2D):
        nn.init.zeros_(module.conv2.weight)
    elif isinstance(module, ResnetBlock3D):
        nn.init.zeros_(module.conv2.conv.weight)
    elif isinstance(module, SpatialAttention):
        nn.init.zeros_(module.proj_out.conv.weight)
    elif isinstance(module, Downsample | Upsample):
        weight = nn.init.zeros_(module.conv.weight)
        each = torch.arange(len(weight))
        if isinstance(module, Downsample):
            weight[each, each, :2, :2] = 1 / 4
        else:
            weight[each, each, 1, 1] = 1
    elif isinstance(module, TimeDownsample | TimeUpsample):
        weight = nn.init.zeros_(module.conv.conv.weight)
        each = torch.arange(len(weight))
        if isinstance(module, TimeDownsample):
            weight[each, each, 1:, :2, :2] = 1 / 8
        else:
            weight[each, each, -1, 1, 1] = 1  # causal in time: the last tap is now


def _last_conv(layers: nn.ModuleList) -> nn.Conv2d:
    last = layers[-1]
    assert isinstance(last, nn.Conv2d)
    return last


def with_whitening(vae: WFVAEModel, mean: Tensor, std: Tensor) -> WFVAEModel:
    """The same VAE whose `scale_latents` gives each channel mean 0 and deviation 1; shares the weights.

    Args:
        mean, std: [C] of the latents that the VAE gives.
    Raises:
        ValueError: a std that is not positive.
    """
    if not bool((std > 0).all()):
        raise ValueError(f"std={std.min().item()} of a latent channel must be positive: the channel carries nothing")
    options = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        other = WFVAEModel(**options | {"scale": tuple((1 / std).tolist()), "shift": tuple(mean.tolist())})
    other.load_state_dict(vae.state_dict(), assign=True)
    return other.train(vae.training).requires_grad_(next(vae.parameters()).requires_grad)


def moments_of(vae: WFVAEModel, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, C, T', H', W'], fp32, of video [B, 3, T, H, W]; gradients pass."""
    mean, logvar = vae.encoder(video, Stream()).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def video_of(vae: WFVAEModel, latents: Tensor) -> Tensor:
    """Video [B, 3, T, H, W], fp32, of the VAE's latents [B, C, T', H', W']; gradients pass."""
    video: Tensor = vae.decoder(latents, Stream())
    return video.float()


def build_transformer(size: DitSize, latent_channels: int) -> OpenSoraPlanTransformer3DModel:
    """A fresh DiT: the output, the way of the text into the tokens, and what depends on the timestep start at zero."""
    shape = DIT_SHAPES[size]
    dit = OpenSoraPlanTransformer3DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=shape.blocks,
        cross_attention_dim=shape.heads * shape.head_dim,
        caption_channels=shape.text_width,
    )
    zeroed: list[nn.Linear] = [dit.proj_out, dit.adaln_single.linear]
    zeroed += [block.attn2.to_out[0] for block in dit.blocks()]
    for module in zeroed:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return dit


def build_text_encoder(size: DitSize, vocab_size: int) -> MT5EncoderModel:
    """A fresh mT5 encoder of two layers without dropout, so that only the seeds decide what training does.

    Its heads begin with a view each: of the words near, before, behind, and of all. mT5 knows the places of words by
    the bias between them alone. Its own beginning, close to zero, was drowned in what words say to each other, and the
    trained encoder was a bag of words, which does not know which of two objects is on the left (`tools/caption_gain`).
    """
    width = DIT_SHAPES[size].text_width
    heads = max(1, width // 32)
    config = MT5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=width // heads,
        num_heads=heads,
        d_ff=2 * width,
        num_layers=2,
        dropout_rate=0.0,
        is_encoder_decoder=False,
    )
    encoder = MT5EncoderModel(config)
    half = torch.arange(config.relative_attention_num_buckets // 2)
    exact = len(half) // 2  # distances with a bucket each; the others have one for each factor of the same size
    factor = (config.relative_attention_max_distance / exact) ** ((half - exact) / (len(half) - exact))
    far = torch.where(half < exact, half, exact * factor)
    near, one, other = -_NEAR * far, -_ONE_SIDE * far, torch.full_like(far, _OTHER_SIDE)
    views = [(near, near), (one, other), (other, one), (0 * far, 0 * far)]  # of words before and of words behind
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
    with torch.no_grad():
        for head in range(heads):
            bias[:, head] = torch.cat(views[head % len(views)])
    return encoder


# --- tokenizer ------------------------------------------------------------------------------------------------------


def vocabulary() -> list[tuple[str, float, PieceKind]]:
    """Pieces with log probabilities: mT5's control pieces, the words of captions and of what surrounds them, letters.

    The words are those of the grammar, of the prompt template and of the negative prompt; other words are spelt in
    ASCII, and what is not ASCII is unknown.
    """
    rng = np.random.default_rng(0)
    captions = (caption(scene_at(0, i, split="any"), rng, omit=0.1) for i in range(4000))
    counts = Counter(_words([PROMPT_TEMPLATE.format(prompt=""), NEGATIVE_PROMPT]))
    counts.update(_words(captions))
    total = sum(counts.values())
    letters = ["▁", "\n", "\t", *sorted(set(string.printable) - set(string.whitespace))]
    return [
        ("<pad>", 0.0, PieceKind.CONTROL),
        ("</s>", 0.0, PieceKind.CONTROL),
        ("<unk>", 0.0, PieceKind.UNKNOWN),
        *((f"▁{word}", math.log(n / total), PieceKind.NORMAL) for word, n in sorted(counts.items())),
        *((letter, _LETTER_SCORE, PieceKind.NORMAL) for letter in letters),
    ]


def _words(texts: Iterable[str]) -> list[str]:
    stripped = (word.strip(string.punctuation) for text in texts for word in text.split())
    return [word for word in stripped if word]


def write_tokenizer(folder: Path) -> None:
    """Write `spiece.model`, as mT5's checkpoints hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_spiece(folder / "spiece.model", vocabulary())


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, same_length: bool = False) -> dict[str, Tensor]:
    """`ids` and `mask`, int64 [B, L], of texts as `prompt_rows` makes them.

    L is the longest of these, or with `same_length` TEXT_TOKENS, so that every batch has the same shapes.
    """
    padding = "max_length" if same_length else "longest"
    tokens = tokenizer(texts, padding=padding, max_length=TEXT_TOKENS, return_tensors="pt")
    return {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}


# --- the pipeline directory -----------------------------------------------------------------------------------------


def export_parts(
    parts: OpenSoraPlanParts, spiece: Path, out: Path, dtype: torch.dtype, card: str, training: Mapping[str, Any]
) -> int:
    """Write the pipeline directory (safetensors in `dtype`, README.md, TRAINING) and return its size in bytes.

    The directory appears complete or not at all.

    Args:
        spiece: the tokenizer's file.
    Raises:
        ValueError: larger than MAX_BYTES, or `out` exists and is no pipeline directory.
    """

    def write(folder: Path) -> None:
        for name, model in (("transformer", parts.transformer), ("vae", parts.vae)):
            write_tensors(folder / name, DIFFUSERS_STEM, _sources(model.state_dict()), dtype, MAX_BYTES)
            model.save_config(folder / name)
        state = {key: value for key, value in parts.text_encoder.state_dict().items() if key != TEXT_ALIAS}
        write_tensors(folder / "text_encoder", "model", _sources(state), dtype, MAX_BYTES)
        parts.text_encoder.config.architectures = ["MT5EncoderModel"]
        parts.text_encoder.config.save_pretrained(folder / "text_encoder")
        (folder / "tokenizer").mkdir()
        shutil.copyfile(spiece, folder / "tokenizer" / "spiece.model")
        index = {
            "_class_name": "OpenSoraPlanPipeline",
            "text_encoder": ["transformers", "MT5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["pipelines.models.open_sora_plan", "OpenSoraPlanTransformer3DModel"],
            "vae": ["pipelines.models.wf_vae", "WFVAEModel"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    return export_directory(write, out, dtype, card, training, MAX_BYTES)


def _sources(state: Mapping[str, Tensor]) -> dict[str, Source]:
    def reader(value: Tensor) -> Source:
        return Source(tuple(value.shape), lambda: value)

    return {key: reader(value) for key, value in state.items()}
