"""Checkpoints load exactly or not at all: official folders, converted ones, and every way they can be wrong."""

import gzip
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, MT5Config, MT5EncoderModel
from typer.testing import CliRunner

from pipelines.models import open_sora_plan_loading as loading
from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel
from pipelines.models.open_sora_plan_layout import find_folders
from pipelines.models.open_sora_plan_loading import load_text_encoder, load_tokenizer, load_transformer, load_vae
from pipelines.models.spiece import PieceKind, read_spiece, spiece_tokenizer
from pipelines.models.wf_vae import WFVAEModel
from tests.osp_recorded import DATA, Recorded, draw, manifest, vae_scale
from tools.convert_open_sora_plan import app, convert
from tools.tiny_open_sora_plan import make_open_sora_plan, write_spiece

Load = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only for the tests: those that spoil it take `spoilt`."""
    return make_open_sora_plan(tmp_path_factory.mktemp("official") / "tiny")


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    return make_open_sora_plan(tmp_path / "tiny")


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_shard(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = {k: v for k, v in json.loads(index.read_text())["weight_map"].items() if v != path.name}
    index.write_text(json.dumps({"weight_map": weight_map | dict.fromkeys(tensors, path.name)}))


def edit_pickle(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- the official folders


def test_every_part_loads(official: Path) -> None:
    folders = find_folders(official)
    stored = {k: v for f in sorted(folders.transformer.glob("*.safetensors")) for k, v in load_file(f).items()}
    transformer = load_transformer(folders.transformer)
    assert transformer.state_dict().keys() == stored.keys()
    assert all(torch.equal(v, stored[k]) for k, v in transformer.state_dict().items())
    content = torch.load(folders.vae / "merged.ckpt", weights_only=True)["ema_state_dict"]
    vae = load_vae(folders.vae)
    assert all(torch.equal(v, content[f"module.{k}"]) for k, v in vae.state_dict().items())
    assert vae.config.t_interpolation == "trilinear"
    content = torch.load(folders.text_encoder / "pytorch_model.bin", weights_only=True)
    assert {"lm_head.weight", "decoder.final_layer_norm.weight"} <= content.keys()
    text = load_text_encoder(folders.text_encoder)
    assert all(torch.equal(v, content[k]) for k, v in text.state_dict().items())
    assert text.shared.weight is text.encoder.embed_tokens.weight
    for model in (transformer, vae, text):
        assert not model.training
        assert not any(p.requires_grad or p.is_meta for p in model.parameters())
        assert all(p.data_ptr() % 16 == 0 for p in model.parameters())


def test_a_single_file_loads_like_shards(spoilt: Path) -> None:
    folder = spoilt / "any93x640x640"
    whole = load_transformer(folder)
    tensors = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    for file in folder.glob("diffusion*"):
        file.unlink()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    assert same(load_transformer(folder), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(official: Path, dtype: torch.dtype) -> None:
    folders = find_folders(official)
    assert {p.dtype for p in load_transformer(folders.transformer, dtype).parameters()} == {dtype}
    assert {p.dtype for p in load_vae(folders.vae, dtype).parameters()} == {dtype}
    text = load_text_encoder(folders.text_encoder, dtype)
    kept = {name for name, p in text.named_parameters() if p.dtype == torch.float32}
    expected = {name for name, _ in text.named_parameters() if name.endswith(".wo.weight")}
    assert kept == (expected if dtype == torch.float16 else set())
    assert text(torch.tensor([[5, 6, 1]])).last_hidden_state.dtype == dtype


def test_text_encoder_of_transformers_agrees(official: Path) -> None:
    ids = torch.tensor([[5, 9, 30, 1, 0, 0]])
    mask = (ids != 0).long()
    theirs = MT5EncoderModel.from_pretrained(official / "mt5-xxl").eval()
    with torch.no_grad():
        a, b = (m(ids, mask).last_hidden_state for m in (theirs, load_text_encoder(official / "mt5-xxl")))
    assert (a - b).abs().max() < 1e-5


def test_text_encoder_may_lie_elsewhere(spoilt: Path) -> None:
    elsewhere = spoilt.parent / "models--mt5"
    (spoilt / "mt5-xxl").rename(elsewhere)
    with pytest.raises(ValueError, match=r"text_encoder: none of .*mt5-xxl.* holds config\.json"):
        find_folders(spoilt)
    assert find_folders(spoilt, elsewhere).tokenizer == elsewhere


def test_released_mt5_keys() -> None:
    released = manifest("mt5xxl_encoder")
    with torch.device("meta"):
        model = MT5EncoderModel(MT5Config(**released["config"]))
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == released["keys"]
    assert sum(p.numel() for p in model.parameters()) == released["num_params_without_alias"]


@pytest.mark.parametrize("wrap", ["ema", "gen_model", "state_dict", "plain", "old names"])
def test_layouts_of_the_pickle(tmp_path: Path, wrap: str) -> None:
    """The recorded model, stored in each way that upstream wrote it, with all its wavelet filters."""
    recorded = Recorded("wfvae_tiny")
    model = WFVAEModel(**recorded.config)
    weights: dict[str, Any] = draw({k: v.shape for k, v in model.state_dict().items()}, recorded.seed, vae_scale)
    weights["encoder.wavelet_transform_in.g_v_conv.conv.weight"] = torch.tensor(
        [0.3536, -0.3536, 0.3536, -0.3536, -0.3536, 0.3536, -0.3536, 0.3536]
    ).view(1, 1, 2, 2, 2)
    weights["decoder.inverse_wavelet_tranform_l1.da"] = torch.tensor([0.5, -0.5, 0.5, -0.5]).view(1, 1, 2, 2)
    wrong = {"encoder.nothing": torch.zeros(1)}
    if wrap == "ema":
        content = {"ema_state_dict": {f"module.{k}": v for k, v in weights.items()}, "state_dict": wrong}
    elif wrap == "gen_model":
        content = {"ema_state_dict": {}, "state_dict": {"gen_model": weights, "dics_model": wrong}, "epoch": 3}
    elif wrap == "state_dict":
        content = {"state_dict": weights}
    elif wrap == "plain":
        content = weights
    else:
        old = {re.sub(r"connect_l2\.", "connect_l3.", k): v for k, v in weights.items()}
        content = {re.sub(r"connect_l1\.", "connect_l2.", k): v for k, v in old.items()}
    (tmp_path / "config.json").write_text(json.dumps(recorded.config))
    torch.save(content, tmp_path / "merged.ckpt")
    loaded = load_vae(tmp_path)
    out = loaded.decode(recorded.tensors["image_t1/inputs/latents"]).sample
    assert (out - recorded.tensors["image_t1/outputs/decode"]).abs().max() < 2e-5


def test_sizes_left_out_of_the_config_come_from_the_tensors(spoilt: Path) -> None:
    whole = load_vae(spoilt / "vae")
    names = ("base_channels", "latent_dim", "encoder_energy_flow_hidden_size", "decoder_energy_flow_hidden_size",
             "connect_res_layer_num", "norm_type")  # fmt: skip
    edit_json(spoilt / "vae/config.json", **dict.fromkeys(names))
    assert same(load_vae(spoilt / "vae"), whole)
    edit_json(spoilt / "vae/config.json", connect_res_layer_num=1, norm_type="groupnorm")
    with pytest.raises(ValueError, match=r"connect_res_layer_num=1, the tensors say 2; norm_type='groupnorm'"):
        load_vae(spoilt / "vae")


def test_unknown_config_keys_are_left_out(spoilt: Path) -> None:
    edit_json(spoilt / "any93x640x640/config.json", hidden_size=48, _name_or_path="x", sample_size=[1, 2])
    edit_json(spoilt / "vae/config.json", something_new=1)
    assert load_transformer(spoilt / "any93x640x640").config.sample_size_h == [80, 80]
    load_vae(spoilt / "vae")


# --- what is wrong is named


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("scale_shift_table"), "1 missing: scale_shift_table"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "1 unexpected: extra.weight"),
        (
            lambda t: t.update(scale_shift_table=torch.zeros(3, 48)),
            r"1 of another shape: scale_shift_table \[3, 48\] instead of \[2, 48\]",
        ),
        (
            lambda t: (t.pop("scale_shift_table"), t.update(a=torch.zeros(1), b=torch.zeros(1))),
            "1 missing: scale_shift_table; 2 unexpected: a, b",
        ),
    ],
)
def test_wrong_tensors_of_the_denoiser(spoilt: Path, edit: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    edit_shard(spoilt / "any93x640x640", edit)
    with pytest.raises(ValueError, match=message):
        load_transformer(spoilt / "any93x640x640")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["ema_state_dict"].pop("module.encoder.conv_out.conv.bias"), "1 missing: encoder.conv_out.conv.b"),
        (lambda c: c["ema_state_dict"].update({"module.x": torch.zeros(1)}), "1 unexpected: x"),
        (
            lambda c: c["ema_state_dict"]["module.encoder.wavelet_tranform_l1.ad"].neg_(),
            r"encoder\.wavelet_tranform_l1\.ad is not the Haar filter",
        ),
        (
            lambda c: c["ema_state_dict"].update({"module.decoder.wavelet_x.db4": torch.zeros(1, 1, 2, 2)}),
            r"decoder\.wavelet_x\.db4 .* is no wavelet filter",
        ),
        (lambda c: c.update(ema_state_dict={"a": 3}), "values that are not tensors: a"),
    ],
)
def test_wrong_tensors_of_the_vae(spoilt: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_pickle(spoilt / "vae/merged.ckpt", edit)
    with pytest.raises(ValueError, match=message):
        load_vae(spoilt / "vae")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("encoder.final_layer_norm.weight"), "1 missing: encoder.final_layer_norm.weight"),
        (lambda c: c.update({"encoder.x": torch.zeros(1)}), "1 unexpected: encoder.x"),
    ],
)
def test_wrong_tensors_of_mt5(spoilt: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_pickle(spoilt / "mt5-xxl/pytorch_model.bin", edit)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(spoilt / "mt5-xxl")


def test_wrong_folders(spoilt: Path) -> None:
    transformer, vae, text = spoilt / "any93x640x640", spoilt / "vae", spoilt / "mt5-xxl"
    edit_json(text / "config.json", model_type="umt5")
    with pytest.raises(ValueError, match="model_type='umt5' must be 'mt5'"):
        load_text_encoder(text)
    shard = next(iter(transformer.glob("*-00002-*")))
    shard.rename(shard.with_suffix(".bak"))
    with pytest.raises(ValueError, match=r"shards that are not there: diffusion_pytorch_model-00002-of-00002"):
        load_transformer(transformer)
    shard.with_suffix(".bak").rename(shard)
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = next(iter(sorted(transformer.glob("*-00001-*")))).name
    index.write_text(json.dumps({"weight_map": weight_map | {"lost.weight": first}}))
    with pytest.raises(ValueError, match=r"its shards lack: lost\.weight in"):
        load_transformer(transformer)
    key = next(iter(weight_map))
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != key}}))
    with pytest.raises(ValueError, match=rf"does not list tensors of its shards: {re.escape(key)} in"):
        load_transformer(transformer)
    (vae / "other.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 files \*\.ckpt"):
        load_vae(vae)
    (vae / "config.json").unlink()
    (vae / "other.ckpt").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_vae(vae)
    (vae / "merged.ckpt").unlink()
    with pytest.raises(ValueError, match=r"holds no weights: none of .*diffusion_pytorch_model\.bin is there"):
        load_vae(vae)


class Harmful:
    """Pickles to a call that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_in_a_pickle_is_run(spoilt: Path) -> None:
    trace = spoilt / "was here"
    torch.save({"state_dict": Harmful(trace)}, spoilt / "vae/merged.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_vae(spoilt / "vae")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Harmful(trace)))  # the twin: it would have
    assert trace.exists()


# --- conversion


@pytest.mark.parametrize("shard_bytes", [10**9, 150_000])
def test_converted_folder_loads_the_same(official: Path, tmp_path: Path, shard_bytes: int) -> None:
    out = convert(find_folders(official), tmp_path / "new" / "osp", shard_bytes=shard_bytes)
    assert not list(out.rglob("*.ckpt")) + list(out.rglob("*.bin")) + list(out.rglob("*.part*"))
    old, new = find_folders(official), find_folders(out)
    assert new.transformer == out / "transformer"
    pairs: list[tuple[Load, str, Any]] = [
        (load_transformer, "transformer", OpenSoraPlanTransformer3DModel),
        (load_vae, "vae", WFVAEModel),
        (load_text_encoder, "text_encoder", MT5EncoderModel),
    ]
    for load, part, model_class in pairs:
        before = load(getattr(old, part))
        assert same(load(getattr(new, part)), before)
        assert same(model_class.from_pretrained(getattr(new, part)), before)  # as diffusers and transformers load
        files = list((out / part).glob("*.safetensors"))
        assert len(files) == 1 if shard_bytes == 10**9 else len(files) > 1
        assert all(file.stat().st_size < shard_bytes + 50_000 for file in files)
    text = "\n    high quality,  a red\tfox étude </s>"
    ids = load_tokenizer(old.tokenizer)(text)["input_ids"]
    assert load_tokenizer(new.tokenizer)(text)["input_ids"] == ids
    assert AutoTokenizer.from_pretrained(new.tokenizer)(text)["input_ids"] == ids


def test_conversion_to_fp16_keeps_wo(official: Path, tmp_path: Path) -> None:
    out = convert(find_folders(official), tmp_path / "osp", torch.float16)
    stored = load_file(out / "text_encoder/model.safetensors")
    assert {k for k, v in stored.items() if v.dtype != torch.float16} == {k for k in stored if k.endswith("wo.weight")}
    assert {v.dtype for v in load_file(out / "vae/diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    loaded = load_text_encoder(out / "text_encoder", torch.float16)
    assert same(loaded, load_text_encoder(official / "mt5-xxl", torch.float16))


def test_conversion_writes_all_or_nothing(spoilt: Path, tmp_path: Path) -> None:
    edit_pickle(spoilt / "mt5-xxl/pytorch_model.bin", lambda c: c.pop("shared.weight") is c.pop(loading.TEXT_ALIAS))
    result = CliRunner().invoke(app, ["--weights", str(spoilt), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "1 missing: shared.weight" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/keep").touch()
    with pytest.raises(FileExistsError, match="nothing was written"):
        convert(find_folders(spoilt), tmp_path / "out")


def test_only_the_wanted_tensor_is_read(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out: list[str] = []
    monkeypatch.setattr(loading, "_reader", lambda file, key: lambda: out.append(key) or file.get_tensor(key))
    sources = loading.open_tensors(official / "any93x640x640", (loading.DIFFUSERS_STEM,))
    assert sources["scale_shift_table"].shape == (2, 48)
    assert not out
    sources["scale_shift_table"].read()
    assert out == ["scale_shift_table"]


# --- the tiny checkpoint


def test_same_arguments_give_the_same_weights(official: Path, tmp_path: Path) -> None:
    again = make_open_sora_plan(tmp_path / "again")
    other = make_open_sora_plan(tmp_path / "other", seed=1)
    assert same(load_transformer(again / "any93x640x640"), load_transformer(official / "any93x640x640"))
    assert same(load_vae(again / "vae"), load_vae(official / "vae"))
    assert same(load_text_encoder(again / "mt5-xxl"), load_text_encoder(official / "mt5-xxl"))
    assert not same(load_transformer(other / "any93x640x640"), load_transformer(official / "any93x640x640"))
    assert sum(f.stat().st_size for f in official.rglob("*") if f.is_file()) < 3e6


@pytest.mark.parametrize(("heads", "dim"), [(3, 12), (8, 12), (24, 6)])
def test_other_head_counts(tmp_path: Path, heads: int, dim: int) -> None:
    config = load_transformer(make_open_sora_plan(tmp_path / "m", heads=heads) / "any93x640x640").config
    assert (config.num_attention_heads, config.attention_head_dim) == (heads, dim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"head_dim": 16}, "head_dim=16 must be a multiple of 6, nearest is 18"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_open_sora_plan(tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


# --- sentencepiece files


def test_tokens_equal_those_of_sentencepiece(tmp_path: Path) -> None:
    """A model trained by sentencepiece 0.2.3 with mT5's normalisation, and the ids that package gave."""
    path = tmp_path / "spiece.model"
    path.write_bytes(gzip.decompress((DATA / "spiece_nfkc.model.gz").read_bytes()))
    tokenizer = spiece_tokenizer(path)
    expected: dict[str, list[int]] = json.loads((DATA / "spiece_nfkc.json").read_text())
    assert {text: tokenizer(text)["input_ids"] for text in expected} == expected
    model = read_spiece(path)
    assert len(model.charsmap) > 200_000
    assert model.pieces[3] == ("<usr>", 0.0, PieceKind.USER_DEFINED)


def test_spiece_round_trip(tmp_path: Path) -> None:
    special = [("<pad>", 0.0, PieceKind.CONTROL), ("</s>", 0.0, PieceKind.CONTROL), ("<unk>", 0.0, PieceKind.UNKNOWN)]
    normal = [(text, score, PieceKind.NORMAL) for text, score in (("▁fox", -1.5), ("▁", -9.0), ("é", -9.25))]
    pieces = [*special, *normal]
    write_spiece(tmp_path / "a.model", pieces)
    assert list(read_spiece(tmp_path / "a.model").pieces) == pieces
    tokenizer = spiece_tokenizer(tmp_path / "a.model")
    assert tokenizer(" fox  é", padding="max_length", max_length=6)["input_ids"] == [3, 4, 5, 1, 0, 0]


@pytest.mark.parametrize("damage", ["text", "cut", "bpe", "no end"])
def test_other_files_are_no_sentencepiece_model(official: Path, tmp_path: Path, damage: str) -> None:
    good = (official / "mt5-xxl/spiece.model").read_bytes()
    content = {
        "text": b"# a readme\n",
        "cut": good[:-3],
        "bpe": good.replace(b"\x18\x01\xc0\x02\x02", b"\x18\x02\xc0\x02\x02"),
        "no end": good.replace(b"</s>", b"<-s>"),
    }[damage]
    assert content != good
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"spiece\.model"):
        load_tokenizer(tmp_path)


def test_tokenizer_must_append_the_end(official: Path, tmp_path: Path) -> None:
    spiece_tokenizer(official / "mt5-xxl/spiece.model").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(ValueError, match="does not append the end token"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"holds neither tokenizer\.json nor spiece\.model"):
        load_tokenizer(official / "vae")
