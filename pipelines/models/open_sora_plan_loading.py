"""Opens Open-Sora-Plan 1.3 checkpoints: the official folders, or those of tools/convert_open_sora_plan.py.

Every learned tensor of a file must have its place in the model and the other way round; anything missing, unexpected or
of another shape is named. Tensors are read one at a time from mapped files, so that a model costs its own size in host
memory and no more.

Official layout, below one folder or each part on its own:

    any93x640x640/  config.json, diffusion_pytorch_model.safetensors or its shards with an index
    vae/            config.json, merged.ckpt
    mt5-xxl/        config.json, pytorch_model.bin (its decoder is skipped), spiece.model
"""

import inspect
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MT5Config, MT5EncoderModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel
from pipelines.models.open_sora_plan_layout import CheckpointFolders
from pipelines.models.spiece import spiece_tokenizer
from pipelines.models.wf_vae import WFVAEModel
from pipelines.models.wf_vae_layers import HAAR_2D_SCALE, HAAR_3D_SCALE

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEMS = ("model", "pytorch_model")
TEXT_TABLE = "shared.weight"
TEXT_ALIAS = "encoder.embed_tokens.weight"  # the same tensor under its second name
_NAMED_AT_MOST = 20
_HAAR_FILTERS = {  # upstream's name: whether it is high in time, height, width (3D) or in height, width (2D)
    "h": (False, False, False),
    "g": (False, False, True),
    "hh": (False, True, False),
    "gh": (False, True, True),
    "h_v": (True, False, False),
    "g_v": (True, False, True),
    "hh_v": (True, True, False),
    "gh_v": (True, True, True),
    "aa": (False, False),
    "ad": (True, False),
    "da": (False, True),
    "dd": (True, True),
}
_Model = TypeVar("_Model", bound=nn.Module)


class Source(NamedTuple):
    """One tensor of a file: its shape, known before it is read, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def load_transformer(
    folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> OpenSoraPlanTransformer3DModel:
    """The denoiser of a folder with config.json and safetensors, sharded or not; the inpainting variant likewise.

    Raises:
        ValueError: the config or the tensors do not fit; names every one.
    """
    return _fill(empty_transformer(folder), open_tensors(folder, (DIFFUSERS_STEM,)), folder, dtype, device)


def load_vae(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> WFVAEModel:
    """The VAE of a folder with config.json and a pickled `*.ckpt` (which wins, as upstream) or safetensors.

    Sizes that config.json leaves out are taken from the tensors.

    Raises:
        ValueError: the config or the tensors do not fit; names every one. A pickle that holds more than tensors.
    """
    sources = open_vae_tensors(folder)
    return _fill(empty_vae(folder, sources), sources, folder, dtype, device)


def load_text_encoder(
    folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> MT5EncoderModel:
    """The mT5 encoder of a folder with config.json and weights of the encoder alone or of the whole model.

    In fp16 the output projections `wo` of the MLPs stay in fp32, as transformers keeps them.

    Raises:
        ValueError: another architecture (umT5 has other weights), or tensors that do not fit; names every one.
    """
    model = empty_text_encoder(folder)
    model = _fill(model, open_text_encoder_tensors(folder), folder, dtype, device, is_kept_fp32, (TEXT_ALIAS,))
    model.tie_weights()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder with `tokenizer.json` or, as the official one, `spiece.model`.

    Raises:
        ValueError: neither is there, or it does not append the end token.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
    elif (folder / "spiece.model").is_file():
        tokenizer = spiece_tokenizer(folder / "spiece.model")
    else:
        raise ValueError(f"tokenizer={folder} holds neither tokenizer.json nor spiece.model")
    if tokenizer("")["input_ids"] != [tokenizer.eos_token_id]:
        raise ValueError(f"tokenizer={folder} does not append the end token </s>, as that of mT5 does")
    return tokenizer


def empty_transformer(folder: Path) -> OpenSoraPlanTransformer3DModel:
    """The denoiser that a folder's config.json describes, on the meta device."""
    with torch.device("meta"):
        return OpenSoraPlanTransformer3DModel(**known_options(OpenSoraPlanTransformer3DModel, _config(folder)))


def empty_vae(folder: Path, sources: Mapping[str, Source]) -> WFVAEModel:
    """The VAE that a folder's config.json and the shapes of its tensors describe, on the meta device.

    Raises:
        ValueError: the two contradict each other.
    """
    options = vae_options(known_options(WFVAEModel, _config(folder)), {k: s.shape for k, s in sources.items()}, folder)
    with torch.device("meta"):
        return WFVAEModel(**options)


def empty_text_encoder(folder: Path) -> MT5EncoderModel:
    """The mT5 encoder that a folder's config.json describes, on the meta device.

    Raises:
        ValueError: another architecture.
    """
    config = _config(folder)
    if config.get("model_type") not in ("mt5", "t5"):
        raise ValueError(f"{folder}/config.json: model_type={config.get('model_type')!r} must be 'mt5'")
    with torch.device("meta"):
        return MT5EncoderModel(MT5Config(**{k: v for k, v in config.items() if k != "model_type"}))


def loaded_bytes(
    folders: CheckpointFolders, text_encoder: torch.dtype, transformer: torch.dtype, vae: torch.dtype
) -> tuple[int, int, int]:
    """Bytes of the weights of text encoder, denoiser and VAE once loaded in these precisions; reads none of them.

    Raises:
        ValueError: config files that describe no model of these kinds.
    """
    encoder = empty_text_encoder(folders.text_encoder)
    kept = {name: torch.float32 if is_kept_fp32(name, text_encoder) else text_encoder for name in encoder.state_dict()}
    return (
        sum(p.numel() * kept[name].itemsize for name, p in encoder.named_parameters()),
        sum(p.numel() * transformer.itemsize for p in empty_transformer(folders.transformer).parameters()),
        sum(p.numel() * vae.itemsize for p in empty_vae(folders.vae, open_vae_tensors(folders.vae)).parameters()),
    )


def open_tensors(folder: Path, stems: tuple[str, ...]) -> dict[str, Source]:
    """Every tensor of a folder: `stem.safetensors` or `stem.bin`, or their shards with `.index.json`.

    Raises:
        ValueError: no such file, a shard that is absent, or a key that its shard lacks.
    """
    tried = []
    for suffix in (".safetensors", ".bin"):
        for stem in stems:
            single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
            tried += [index.name, single.name]
            if index.is_file():
                return _open_sharded(index)
            if single.is_file():
                return _open_file(single)
    raise ValueError(f"{folder} holds no weights: none of {', '.join(tried)} is there")


def open_vae_tensors(folder: Path) -> dict[str, Source]:
    """The learned tensors of a VAE folder, under the names of `WFVAEModel`.

    Raises:
        ValueError: several pickles, one that holds more than tensors, or wavelet filters other than Haar's.
    """
    pickles = sorted(folder.glob("*.ckpt"))
    if len(pickles) > 1:
        raise ValueError(
            f"{folder} holds {len(pickles)} files *.ckpt, must be one: {', '.join(p.name for p in pickles)}"
        )
    sources = _open_pickle(pickles[0], unwrap_vae) if pickles else open_tensors(folder, (DIFFUSERS_STEM,))
    if any(".connect_l3." in key for key in sources):  # before October 2024 the levels counted from 2
        sources = {re.sub(r"\.connect_l([23])\.", _one_less, key): source for key, source in sources.items()}
    for key in [key for key in sources if "wavelet" in key]:
        check_wavelet_filter(key, sources.pop(key).read())
    return sources


def open_text_encoder_tensors(folder: Path) -> dict[str, Source]:
    """The encoder's tensors of an mT5 folder: decoder and language-model head left out, the shared table once."""
    sources = open_tensors(folder, TRANSFORMERS_STEMS)
    skipped = ("decoder.", "lm_head.")
    sources = {key: source for key, source in sources.items() if not key.startswith(skipped)}
    alias = sources.pop(TEXT_ALIAS, None)
    if alias is not None:
        sources.setdefault(TEXT_TABLE, alias)
    return sources


def unwrap_vae(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors of a training checkpoint: the averaged weights if there, else the generator's, else all.

    Args:
        content: what the pickle holds.
    """
    if content.get("ema_state_dict"):
        return {key.replace("module.", ""): value for key, value in content["ema_state_dict"].items()}
    if "state_dict" in content:
        inner: Mapping[str, Any] = content["state_dict"]
        return inner.get("gen_model", inner)
    return content


def vae_options(options: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, Any]:
    """Complete `WFVAEModel` options by what the tensors' shapes tell.

    Raises:
        ValueError: options and shapes contradict each other.
    """
    found: dict[str, Any] = {}

    def rows(key: str, dim: int = 0) -> int | None:
        return shapes[key][dim] if key in shapes else None

    base = rows("encoder.down1.0.weight")
    found["base_channels"] = base
    found["latent_dim"] = rows("decoder.conv_in.conv.weight", 1)
    found["encoder_energy_flow_hidden_size"] = rows("encoder.connect_l1.weight")
    last_mid = max((int(m[1]) for m in map(re.compile(r"decoder\.mid\.(\d+)\.").match, shapes) if m), default=None)
    widest = rows(f"decoder.mid.{last_mid}.conv2.conv.weight")
    if base is not None and widest is not None:
        found["decoder_energy_flow_hidden_size"] = widest - 4 * base
    indices = {int(m[1]) for m in map(re.compile(r"decoder\.connect_l1\.(\d+)\.").match, shapes) if m}
    if indices:
        found["connect_res_layer_num"] = max(indices)
    if "encoder.norm_out.norm.weight" in shapes:
        found["norm_type"] = "layernorm"
    elif "encoder.norm_out.weight" in shapes:
        found["norm_type"] = "groupnorm"
    wrong = [
        f"{name}={options[name]!r}, the tensors say {value!r}"
        for name, value in found.items()
        if value is not None and name in options and options[name] != value
    ]
    if wrong:
        raise ValueError(f"{folder}/config.json does not fit its tensors: {'; '.join(wrong)}")
    return {name: value for name, value in found.items() if value is not None} | options


def known_options(model: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that the model's constructor takes; others, such as `_class_name`, are left out."""
    names = inspect.signature(model.__init__).parameters  # type: ignore[misc]
    return {name: value for name, value in config.items() if name in names}


def is_kept_fp32(key: str, dtype: torch.dtype) -> bool:
    """Whether this tensor of mT5 stays in fp32 where the rest is in `dtype`: its range exceeds that of fp16."""
    return dtype == torch.float16 and key.endswith(".DenseReluDense.wo.weight")


def check_wavelet_filter(key: str, value: Tensor) -> None:
    """Refuse a stored wavelet filter that is not the constant which the model computes with.

    Raises:
        ValueError: names the key.
    """
    match = re.search(r"wavelet_\w+\.(?:(\w+)_conv\.conv\.weight|(\w+))$", key)
    name = (match[1] or match[2]) if match else ""
    if name not in _HAAR_FILTERS:
        raise ValueError(f"{key} {list(value.shape)} is no wavelet filter that this model knows")
    axes = _HAAR_FILTERS[name]
    expected = torch.tensor(HAAR_3D_SCALE if len(axes) == 3 else HAAR_2D_SCALE)
    for high in axes:
        expected = torch.stack((expected, -expected if high else expected), dim=-1)
    if value.shape[2:] != expected.shape or not torch.allclose(value[0, 0].float(), expected, atol=1e-3):
        raise ValueError(f"{key} is not the Haar filter that this model computes with")


def check_exact(sources: Mapping[str, Source], model: nn.Module, where: Path, tied: Iterable[str] = ()) -> None:
    """Refuse tensors that are not exactly those of the model; `tied` names second names, which no file needs.

    Raises:
        ValueError: names every tensor that is missing, unexpected or of another shape (the first 20 of each).
    """
    shapes = {key: source.shape for key, source in sources.items()}
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in set(tied)}
    faults = [
        ("missing", sorted(expected.keys() - shapes.keys())),
        ("unexpected", sorted(shapes.keys() - expected.keys())),
        (
            "of another shape",
            [
                f"{key} {list(shapes[key])} instead of {list(expected[key])}"
                for key in sorted(expected.keys() & shapes.keys())
                if shapes[key] != expected[key]
            ],
        ),
    ]
    if any(names for _, names in faults):
        parts = [f"{len(names)} {what}: {_some(names)}" for what, names in faults if names]
        raise ValueError(f"{where} does not fit the model: {'; '.join(parts)}")


def _fill(
    model: _Model,
    sources: Mapping[str, Source],
    where: Path,
    dtype: torch.dtype,
    device: str | torch.device,
    keep_fp32: Callable[[str, torch.dtype], bool] = lambda key, dtype: False,
    tied: Iterable[str] = (),
) -> _Model:
    """Put every tensor in its place in a model built on the meta device."""
    check_exact(sources, model, where, tied)
    tensors = {}
    for key, source in sources.items():
        kept = torch.float32 if keep_fp32(key, dtype) else dtype
        # a copy: tensors of mapped files lie off the alignment that the kernels for built models get
        tensors[key] = source.read().to(dtype=kept, device=device, copy=True)
    for key in tied:
        tensors[key] = tensors[TEXT_TABLE]
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _open_sharded(index: Path) -> dict[str, Source]:
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise ValueError(f"{index} names shards that are not there: {_some(absent)}")
    found = {shard: _open_file(index.parent / shard) for shard in shards}
    lost = sorted(f"{key} in {shard}" for key, shard in weight_map.items() if key not in found[shard])
    if lost:
        raise ValueError(f"{index} names tensors that its shards lack: {_some(lost)}")
    unlisted = sorted(
        f"{key} in {shard}" for shard, keys in found.items() for key in keys if weight_map.get(key) != shard
    )
    if unlisted:
        raise ValueError(f"{index} does not list tensors of its shards: {_some(unlisted)}")
    return {key: found[shard][key] for key, shard in weight_map.items()}


def _open_file(path: Path) -> dict[str, Source]:
    if path.suffix != ".safetensors":
        return _open_pickle(path, lambda content: content)
    file = safe_open(path, framework="pt")
    keys: list[str] = list(file.keys())
    return {key: Source(tuple(file.get_slice(key).get_shape()), _reader(file, key)) for key in keys}


def _reader(file: Any, key: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(key)


def _open_pickle(path: Path, unwrap: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> dict[str, Source]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, so it is not opened: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, must be a mapping of tensors")
    tensors = unwrap(content)
    others = sorted(key for key, value in tensors.items() if not isinstance(value, Tensor))
    if others:
        raise ValueError(f"{path} holds values that are not tensors: {_some(others)}")
    return {key: Source(tuple(value.shape), _constant(value)) for key, value in tensors.items()}


def _constant(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _one_less(match: re.Match[str]) -> str:
    return f".connect_l{int(match[1]) - 1}."


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
