"""A tiny random Open-Sora-Plan 1.3 checkpoint in the official layout, for tests, demo and benchmarks."""

import json
import math
import os
import shutil
import string
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MT5Config, MT5ForConditionalGeneration

from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel
from pipelines.models.spiece import PieceKind
from pipelines.models.wf_vae import WFVAEModel
from pipelines.models.wf_vae_layers import HAAR_2D_SCALE, HAAR_3D_SCALE
from pipelines.open_sora_plan import NEGATIVE_PROMPT, PROMPT_TEMPLATE
from tools.tiny_weights import Scale, fan_in, fill

SHARDS = 2
_WORDS = (
    "a an the of in on at over under and with to red green blue yellow purple orange black white gray circle square "
    "triangle star moves moving left right up down still fast slow slowly fox cat dog bird man woman boat car train "
    "river sea snow forest city street night day rain cloud sky camera zoom crossing fresh frozen old young large "
    "small two three cinematic light detail realistic"
)


def make_open_sora_plan(
    output: Path,
    *,
    seed: int = 0,
    heads: int = 4,
    head_dim: int | None = None,
    num_layers: int = 4,
    base_channels: int = 4,
) -> Path:
    """Write a tiny random checkpoint as `LanguageBind/Open-Sora-Plan-v1.3.0` and `google/mt5-xxl` lay theirs out.

    `any93x640x640/` holds the denoiser in two safetensors shards, `vae/` a pickled `merged.ckpt` of averaged weights
    with some of the constant wavelet filters, `mt5-xxl/` a `pytorch_model.bin` of encoder and decoder and a
    `spiece.model`. Latent channels, strides and patch are the released ones; widths and depths shrink. With four
    blocks or more, every kind of attention occurs. The same arguments give the same weights; all are float32.

    Args:
        output: directory to create; may exist if empty.
        seed: of all weights, 0 or more.
        heads: attention heads N of the denoiser.
        head_dim: D of a head, a multiple of 6. None: 12, or 6 above 8 heads.
        num_layers: blocks of the denoiser.
        base_channels: narrowest width of the VAE.
    Returns:
        `output`.
    Raises:
        ValueError: an argument out of range.
        FileExistsError: `output` is a file, or a directory that is not empty.
    """
    dim = head_dim if head_dim is not None else (12 if heads <= 8 else 6)
    for name, value, least in (
        ("seed", seed, 0),
        ("heads", heads, 1),
        ("num_layers", num_layers, 1),
        ("base_channels", base_channels, 2),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}, nearest is {least}")
    if dim < 6 or dim % 6:
        raise ValueError(f"head_dim={dim} must be a multiple of 6, nearest is {max(6, round(dim / 6) * 6)}")
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"output={str(output)!r} exists and is not an empty directory; nothing was written")

    pieces = vocabulary()
    transformer = OpenSoraPlanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=dim,
        cross_attention_dim=heads * dim,
        num_layers=num_layers,
        caption_channels=48,
        sample_size_h=(80, 80),
        sample_size_w=(80, 80),
        sample_size_t=24,
    )
    vae = WFVAEModel(
        base_channels=base_channels,
        encoder_energy_flow_hidden_size=base_channels,
        decoder_energy_flow_hidden_size=base_channels,
        norm_type="layernorm",
        t_interpolation="trilinear",
        connect_res_layer_num=2,
    )
    text = MT5ForConditionalGeneration(
        MT5Config(vocab_size=len(pieces), d_model=48, d_kv=12, num_heads=4, d_ff=96, num_layers=2, num_decoder_layers=1)
    )
    fill(transformer, "transformer", seed, _transformer_scale)
    fill(vae, "vae", seed, _vae_scale)
    fill(text, "text_encoder", seed, _text_scale)

    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        _write_transformer(part / "any93x640x640", transformer)
        _write_vae(part / "vae", vae)
        _write_text_encoder(part / "mt5-xxl", text, pieces)
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output


def vocabulary() -> list[tuple[str, float, PieceKind]]:
    """Pieces with scores: control pieces as in mT5, whole words of common prompts, and every ASCII character."""
    prompts = f"{PROMPT_TEMPLATE.format(prompt=_WORDS)} {NEGATIVE_PROMPT}"
    words = sorted({word for text in prompts.split() for word in text.strip(string.punctuation).split() if word})
    letters = ["▁", "\n", "\t", *sorted(set(string.printable) - set(string.whitespace))]
    return [
        ("<pad>", 0.0, PieceKind.CONTROL),
        ("</s>", 0.0, PieceKind.CONTROL),
        ("<unk>", 0.0, PieceKind.UNKNOWN),
        *((f"▁{word}", -6.0, PieceKind.NORMAL) for word in words),
        *((letter, -10.0, PieceKind.NORMAL) for letter in letters),
    ]


def write_spiece(path: Path, pieces: Iterable[tuple[str, float, PieceKind]]) -> None:
    """Write a unigram sentencepiece model whose first three pieces are padding, end and unknown."""
    model = b""
    for text, score, kind in pieces:
        piece = _bytes_field(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _int_field(3, kind)
        model += _bytes_field(1, piece)
    trainer = _int_field(3, 1) + _int_field(40, 2) + _int_field(41, -1) + _int_field(42, 1) + _int_field(43, 0)
    path.write_bytes(model + _bytes_field(2, trainer) + _bytes_field(3, _bytes_field(1, b"identity")))


def _write_transformer(folder: Path, model: OpenSoraPlanTransformer3DModel) -> None:
    folder.mkdir(parents=True)
    config = {k: v for k, v in model.config.items() if not k.startswith("_") and v is not None}
    _write_json(folder / "config.json", {"_class_name": "OpenSoraT2V_v1_3", "_diffusers_version": "0.30.2"} | config)
    state = model.state_dict()
    names = list(state)
    shards = [names[i::SHARDS] for i in range(SHARDS)]
    weight_map: dict[str, str] = {}
    for i, keys in enumerate(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({key: state[key].contiguous() for key in keys}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors lets only the owner read
        weight_map |= dict.fromkeys(keys, file)
    size = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def _write_vae(folder: Path, model: WFVAEModel) -> None:
    folder.mkdir(parents=True)
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    _write_json(folder / "config.json", {"_class_name": "WFVAEModel", "_diffusers_version": "0.30.2"} | config)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    high = torch.tensor([1.0, -1.0])
    # two of the 24 constants: the released file does not hold all of them either
    state["module.encoder.wavelet_tranform_l1.ad"] = HAAR_2D_SCALE * high.view(1, 1, 2, 1).expand(1, 1, 2, 2).clone()
    haar = HAAR_3D_SCALE * high.view(1, 1, 1, 1, 2).expand(1, 1, 2, 2, 2).clone()
    state["module.decoder.inverse_wavelet_tranform_l2.g"] = haar
    torch.save({"ema_state_dict": state, "state_dict": {"gen_model": {}, "dics_model": {}}}, folder / "merged.ckpt")


def _write_text_encoder(
    folder: Path, model: MT5ForConditionalGeneration, pieces: Sequence[tuple[str, float, PieceKind]]
) -> None:
    folder.mkdir(parents=True)
    _write_json(
        folder / "config.json", {"architectures": ["MT5ForConditionalGeneration"]} | model.config.to_diff_dict()
    )
    torch.save(dict(model.state_dict()), folder / "pytorch_model.bin")
    write_spiece(folder / "spiece.model", pieces)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", special | {"extra_ids": 0, "additional_special_tokens": None})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _transformer_scale(name: str, parameter: Tensor) -> Scale:
    """Sharp attention, so that masks and groups bite, and a v of about unit deviation."""
    if name.endswith("scale_shift_table"):
        return 0.0, 0.3
    if name.endswith("bias"):
        return 0.0, 0.1
    sharp = "to_q" in name or "to_k" in name
    return 0.0, (1.6 if sharp else 1.0) / math.sqrt(fan_in(parameter))


def _vae_scale(name: str, parameter: Tensor) -> Scale:
    """Residual branches as large as the stream, pixels of about 0.5 deviation in [-1, 1]."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if parameter.ndim == 1:
        return 1.0, 0.1
    inputs = fan_in(parameter)
    if name.startswith("decoder.conv_out") or (name.startswith("decoder.connect") and name.endswith(".2.weight")):
        return 0.0, 0.2 / math.sqrt(inputs)
    if name.startswith("decoder.conv_in"):  # latents of the VAE are 5.5 times those of the denoiser
        return 0.0, 0.3 / math.sqrt(inputs)
    return 0.0, 1.1 / math.sqrt(inputs)


def _text_scale(name: str, parameter: Tensor) -> Scale:
    if parameter.ndim == 1:
        return 1.0, 0.1
    if "shared" in name or "relative_attention_bias" in name:
        return 0.0, 1.0
    return 0.0, 1.0 / math.sqrt(fan_in(parameter))


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value % 2**64)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
