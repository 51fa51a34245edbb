"""The bundled models: found by name, equal to diffusers, the same on any number of ranks, and true to their prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline as DiffusersPipeline

from pipelines import HunyuanVideoPipeline, OpenSoraPlanPipeline
from pipelines.bundled import MODELS, bundled_models, find_config, find_weights
from pipelines.checkpoint import open_checkpoint
from pipelines.launch import LocalLauncher
from pipelines.open_sora_plan import (
    OpenSoraPlanParts,
    decode_pixels,
    denoise,
    encode_prompt,
    load_parts,
    prompt_rows,
    text_context,
    trim_text,
)
from pipelines.pipeline import VideoPipeline
from tools import demo_model, demo_open_sora_plan
from tools.bench_quality import Case, ClipSize, bench_prompts, make_renderer, measure
from tools.moving_shapes import ATTRIBUTES
from videopipe.config import Config, ConfigError, ModelConfig, load_config

CONFIGS = {name: load_config(find_config(f"{name}_cpu")) for name in MODELS}
LIMITS = {
    "moving_shapes": demo_model.MAX_BYTES,
    "moving_shapes_open_sora_plan": demo_open_sora_plan.MAX_BYTES,
}
PROMPT = "a large red triangle moves left on a black background"
STEPS = 4


each_model = pytest.mark.parametrize("name", MODELS)


def a_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


def test_names_find_the_folders_beside_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'bundled:moving_shapes' is not in this installation: .*model_index.json$"):
        find_weights("bundled:moving_shapes", tmp_path)
    folder = a_model(tmp_path / MODELS["moving_shapes"])
    assert find_weights("bundled:moving_shapes", tmp_path) == str(folder)
    with pytest.raises(
        ConfigError, match=r"='bundled:moving_shape' is no bundled model, .*, nearest is 'bundled:moving_sh"
    ):
        find_weights("bundled:moving_shape", tmp_path)
    (tmp_path / MODELS["moving_shapes_open_sora_plan"]).mkdir()  # half a folder is no model
    with pytest.raises(ConfigError, match="nearest is 'bundled:moving_shapes'"):
        find_weights("bundled:moving_shapes_open_sora_plan", tmp_path)


@pytest.mark.parametrize("weights", ["owner/name", "some/where", "moving_shapes"])
def test_other_weights_are_left_alone(weights: str) -> None:
    assert find_weights(weights) == weights
    assert open_checkpoint(ModelConfig(weights=weights, revision="x")).location == weights


@each_model
def test_the_directory_is_small_readable_and_has_a_card(name: str) -> None:
    folder = bundled_models()[name]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMITS[name]
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors", ".model"}
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def render(
    pipeline: type[VideoPipeline], name: str, launcher: LocalLauncher, dit: int, vae: int, **call: object
) -> torch.Tensor:
    overrides = ["runtime.threads_per_rank=1"]
    with pipeline.from_pretrained(
        config=CONFIGS[name], overrides=overrides, dit_ranks=dit, vae_ranks=vae, launcher=launcher
    ) as pipe:
        return torch.as_tensor(pipe(PROMPT, num_inference_steps=STEPS, output_type="np", **call).frames)


def test_any_ranks_give_the_clip_of_diffusers(launcher: LocalLauncher) -> None:
    """Twelve heads: seven ranks do not divide them."""
    torch.set_num_threads(1)
    theirs = DiffusersPipeline.from_pretrained(bundled_models()["moving_shapes"], dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    r = CONFIGS["moving_shapes"].request
    guidance = {"negative_prompt": r.negative_prompt, "true_cfg_scale": r.true_cfg_scale}
    size = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": STEPS, "output_type": "np", **guidance}

    def noise() -> torch.Generator:
        return torch.Generator("cpu").manual_seed(3)

    exact = torch.as_tensor(theirs(PROMPT, **size, generator=noise()).frames)
    for dit, vae in ((1, 1), (1, 0), (2, 1), (7, 1)):
        ours = render(HunyuanVideoPipeline, "moving_shapes", launcher, dit, vae, generator=noise())
        assert (ours - exact).abs().max() <= (0 if dit == 1 else 1e-5), (dit, vae)
    # the twin: one word of the prompt changes the clip by far more
    other = torch.as_tensor(theirs(PROMPT.replace("red", "green"), **size, generator=noise()).frames)
    assert (other - exact).abs().max() > 0.1


def test_any_ranks_give_the_clip_of_one_process(launcher: LocalLauncher) -> None:
    torch.set_num_threads(1)
    name = "moving_shapes_open_sora_plan"
    parts, config = load_parts(bundled_models()[name]), CONFIGS[name]
    exact = one_process(parts, config, PROMPT)
    for dit, vae in ((1, 1), (2, 1), (7, 1)):
        ours = render(OpenSoraPlanPipeline, name, launcher, dit, vae, seed=3)
        assert (ours - exact).abs().max() <= (0 if dit == 1 else 1e-5), (dit, vae)
    assert (one_process(parts, config, PROMPT.replace("red", "green")) - exact).abs().max() > 0.1


@torch.no_grad()
def one_process(parts: OpenSoraPlanParts, config: Config, prompt: str) -> torch.Tensor:
    """Frames fp32 [1, T, H, W, 3] in 0..1 of `prompt` with seed 3."""
    r = config.request
    rows = prompt_rows(prompt, None, r.guidance_scale)
    text = encode_prompt(parts.tokenizer, parts.text_encoder, rows, r.max_sequence_length)
    latents = denoise(
        parts.transformer,
        text_context(parts.transformer, trim_text(text)),
        config.spec(),
        num_inference_steps=STEPS,
        guidance_scale=r.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(3),
    )
    return torch.cat(list(decode_pixels(parts.vae, latents)))[None]


@each_model
def test_clips_show_what_held_out_prompts_say(name: str) -> None:
    torch.set_num_threads(1)
    prompts = bench_prompts(8, seed=11, split="held_out", num_objects=1)
    size = ClipSize(num_frames=17, height=64, width=64)
    guidance = CONFIGS[name].request.guidance_scale
    case = Case(name="exact", steps=16, guidance=guidance)
    clips = list(make_renderer(bundled_models()[name], case, size, torch.device("cpu"), 8)(prompts))
    result = measure(prompts, lambda _: clips, None)
    shares = {key: a["share"] for key, a in result["accuracy"].items()}
    assert np.mean([shares[key] for key in ATTRIBUTES]) > 0.8, shares
    # the twin: the clips of other prompts must not pass
    result = measure(prompts, lambda _: [*clips[1:], clips[0]], None)
    assert result["accuracy"]["all"]["share"] < 0.3
