"""The tiny HunyuanVideo checkpoint: real classes and layout, same seed same bytes, output far from constant."""

import filecmp
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tools import make_tiny_checkpoint
from tools.make_tiny_checkpoint import make_hunyuan_video

PROMPT = "A red fox crosses a frozen river"
OTHER_PROMPT = "Two blue boats on a stormy sea"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hunyuan_video(tmp_path_factory.mktemp("tiny") / "hunyuan", seed=0)


@pytest.fixture
def pipe(checkpoint: Path) -> HunyuanVideoPipeline:
    return load(checkpoint)


def load(path: Path) -> HunyuanVideoPipeline:
    pipe = HunyuanVideoPipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: HunyuanVideoPipeline, prompt: str = PROMPT, steps: int = 4, seed: int = 0) -> torch.Tensor:
    return pipe(
        prompt,
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames


def change(ours: torch.Tensor, other: torch.Tensor) -> float:
    return float((ours - other).norm() / ours.norm())


def same_files(left: Path, right: Path) -> bool:
    names = sorted(str(file.relative_to(left)) for file in left.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(right)) for file in right.rglob("*") if file.is_file())
    return filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


def test_layout_and_classes_are_those_of_the_real_checkpoint(checkpoint: Path, pipe: HunyuanVideoPipeline) -> None:
    classes = {name: type(part).__name__ for name, part in pipe.components.items() if "tokenizer" not in name}
    assert classes == {
        "text_encoder": "LlamaModel",
        "text_encoder_2": "CLIPTextModel",
        "transformer": "HunyuanVideoTransformer3DModel",
        "vae": "AutoencoderKLHunyuanVideo",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    assert {entry.name for entry in checkpoint.iterdir()} == {"model_index.json", *pipe.components}
    weights = [file for file in checkpoint.rglob("*") if file.suffix in {".safetensors", ".bin", ".pt", ".ckpt"}]
    assert {file.suffix for file in weights} == {".safetensors"}
    assert len(weights) == 4
    assert sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) < 10e6

    config = pipe.transformer.config
    assert (config.patch_size_t, config.patch_size, config.in_channels, config.guidance_embeds) == (1, 2, 16, True)
    assert (config.num_layers, config.num_single_layers, config.num_refiner_layers) == (2, 2, 1)
    assert sum(config.rope_axes_dim) == config.attention_head_dim
    assert (pipe.vae.spatial_compression_ratio, pipe.vae.temporal_compression_ratio) == (8, 4)
    assert pipe.scheduler.config.shift == 7.0
    assert pipe.text_encoder_2.config.max_position_embeddings == 77


@pytest.mark.parametrize("tokenizer_class", [AutoTokenizer, PreTrainedTokenizerFast])
def test_template_prefix_has_as_many_tokens_as_the_pipeline_cuts(checkpoint: Path, tokenizer_class: type) -> None:
    tokenizer = tokenizer_class.from_pretrained(checkpoint, subfolder="tokenizer")
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    prefix = tokenizer(template.split("{}")[0]).input_ids
    assert len(prefix) == DEFAULT_PROMPT_TEMPLATE["crop_start"] == 95
    full = tokenizer(template.format("über red 1234?!"), padding="max_length", max_length=351)
    assert full.input_ids[:95] == prefix
    assert tokenizer.padding_side == "right"
    assert full.attention_mask[0] == 1
    assert full.attention_mask[-1] == 0
    assert tokenizer.decode(full.input_ids[95:], skip_special_tokens=True).endswith("über red 1234?!")


def test_the_tokenizer_class_of_the_real_index_would_cut_elsewhere(checkpoint: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
    prefix = tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]).input_ids
    assert len(prefix) != 95, "transformers mended LlamaTokenizer: model_index.json may name LlamaTokenizerFast again"


def test_the_stock_pipeline_reads_the_right_tokens(pipe: HunyuanVideoPipeline) -> None:
    _, _, mask = pipe.encode_prompt(PROMPT)
    assert mask.shape == (1, 256)
    assert int(mask.sum()) == len(pipe.tokenizer(PROMPT).input_ids)  # BOS of one is <|eot_id|> of the other
    eos = pipe.tokenizer_2.eos_token_id
    assert eos == pipe.text_encoder_2.config.eos_token_id != 2
    assert pipe.tokenizer_2(PROMPT).input_ids[-1] == eos
    assert pipe.tokenizer_2.model_max_length == 77


def test_same_seed_same_bytes_other_seed_other_bytes(checkpoint: Path, tmp_path: Path) -> None:
    assert same_files(checkpoint, make_hunyuan_video(tmp_path / "again", seed=0))
    for seed in (1, 2**32):  # generators that look at 32 bits only would repeat seed 0
        other = make_hunyuan_video(tmp_path / f"seed{seed}", seed=seed)
        for weights in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
            assert not filecmp.cmp(
                checkpoint / f"{weights}.safetensors", other / f"{weights}.safetensors", shallow=False
            )


@pytest.mark.parametrize("seed", [0, 5])
def test_clip_is_far_from_constant(tmp_path: Path, seed: int) -> None:
    pipe = load(make_hunyuan_video(tmp_path / "m", seed=seed))
    video = pipe(
        PROMPT,
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    frames = (video * 255).round().astype(np.uint8)  # [T, H, W, 3]
    assert frames.shape == (17, 64, 64, 3)
    assert np.isfinite(video).all()
    assert frames.std() > 20
    assert frames.reshape(17, -1).std(axis=1).min() > 20
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean(axis=(1, 2, 3)).min() > 0.5
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 10
    assert np.mean((frames == 0) | (frames == 255)) < 0.25
    assert len(np.unique(frames[::4].reshape(-1, 3) // 64, axis=0)) > 16
    assert np.abs(np.diff(frames.astype(int), axis=3)).mean() > 20  # not gray


@pytest.mark.parametrize("steps", [4, 20, 50])
def test_latents_stay_in_range(pipe: HunyuanVideoPipeline, steps: int) -> None:
    result = latents(pipe, steps=steps)
    assert result.shape == (1, 16, 5, 8, 8)
    assert torch.isfinite(result).all()
    assert 0.3 < float(result.std()) < 5
    assert float(result.abs().max()) < 20


def test_prompt_seed_and_repeat(pipe: HunyuanVideoPipeline) -> None:
    ours = latents(pipe)
    assert torch.equal(ours, latents(pipe))
    assert change(ours, latents(pipe, prompt=OTHER_PROMPT)) > 0.1
    assert change(ours, latents(pipe, prompt=PROMPT.replace("red", "blue"))) > 0.05
    assert change(ours, latents(pipe, seed=1)) > 0.1
    with torch.no_grad():
        pipe.transformer.proj_out.weight.zero_()  # the twin: a denoiser that says nothing ignores the prompt
    assert change(latents(pipe), latents(pipe, prompt=OTHER_PROMPT)) == 0


def test_every_branch_of_the_denoiser_matters(pipe: HunyuanVideoPipeline) -> None:
    ours = latents(pipe)
    branches = [
        module
        for name, module in pipe.transformer.named_modules()
        if name.endswith(("to_out.0", "to_add_out", "ff.net.2", "ff_context.net.2", ".proj_out"))
    ]
    assert len(branches) == 2 + 2 * 4 + 2
    for branch in branches:
        assert change(ours, without(branch, pipe)) > 1e-3
    unread = pipe.text_encoder.layers[3].self_attn.o_proj  # the twin: above the hidden state that is read
    assert change(ours, without(unread, pipe)) == 0
    assert change(ours, without(pipe.text_encoder.layers[1].self_attn.o_proj, pipe)) > 1e-2


def without(branch: nn.Linear, pipe: HunyuanVideoPipeline) -> torch.Tensor:
    kept = branch.weight.detach().clone()
    with torch.no_grad():
        branch.weight.zero_()
        result = latents(pipe)
        branch.weight.copy_(kept)
    return result


def test_24_heads(tmp_path: Path) -> None:
    path = make_hunyuan_video(tmp_path / "wide", seed=3, heads=24)
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 20e6
    pipe = load(path)
    assert pipe.transformer.config.num_attention_heads == 24
    assert 0.3 < float(latents(pipe, steps=2).std()) < 5


def test_sizes_can_be_chosen(tmp_path: Path) -> None:
    path = make_hunyuan_video(
        tmp_path / "m",
        heads=3,
        head_dim=32,
        num_layers=1,
        num_single_layers=3,
        mlp_ratio=4.0,
        vae_channels=(2, 2, 4, 4),
    )
    pipe = load(path)
    config = pipe.transformer.config
    assert (config.num_attention_heads, config.attention_head_dim, config.mlp_ratio) == (3, 32, 4.0)
    assert (config.num_layers, config.num_single_layers, tuple(config.rope_axes_dim)) == (1, 3, (8, 12, 12))
    assert tuple(pipe.vae.config.block_out_channels) == (2, 2, 4, 4)
    assert torch.isfinite(latents(pipe, steps=2)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, r"heads=0 .* nearest is 1"),
        ({"seed": -1}, r"seed=-1 .* nearest is 0"),
        ({"head_dim": 7}, r"head_dim=7 .* nearest is 8"),
        ({"vae_channels": (3, 4, 8)}, r"vae_channels=\(3, 4, 8\) .* nearest is \(4, 4, 8, 8\)"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_hunyuan_video(tmp_path / "m", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        make_hunyuan_video(tmp_path / "full")
    assert (tmp_path / "full" / "note").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    make_hunyuan_video(tmp_path / "empty")
    assert {entry.name for entry in tmp_path.iterdir()} == {"full", "empty"}, "a temporary directory was left behind"


def test_command_line(tmp_path: Path, checkpoint: Path) -> None:
    command = ["--model", "hunyuan-video", "--output", str(tmp_path / "m"), "--seed", "0"]
    result = CliRunner().invoke(make_tiny_checkpoint.app, command)
    assert result.exit_code == 0, result.output
    assert same_files(checkpoint, tmp_path / "m")
    assert CliRunner().invoke(make_tiny_checkpoint.app, command).exit_code == 2
    unknown = CliRunner().invoke(make_tiny_checkpoint.app, ["--model", "sora", "--output", str(tmp_path / "x")])
    assert unknown.exit_code == 2
