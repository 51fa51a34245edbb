"""The bundled models: found by name, equal to diffusers, the same on any number of ranks, and true to their prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline as DiffusersPipeline

from pipelines import HunyuanVideoPipeline
from pipelines.bundled import MODELS, bundled_models, find_config, find_weights
from pipelines.checkpoint import open_checkpoint
from pipelines.launch import LocalLauncher
from tools.bench_quality import Case, ClipSize, bench_prompts, diffusers_renderer, measure
from tools.demo_model import MAX_BYTES
from videopipe.config import ConfigError, ModelConfig, load_config

CONFIG = load_config(find_config("moving_shapes_cpu"))
PROMPT = "a large red triangle moves left on a black background"
needs_model = pytest.mark.skipif(
    "moving_shapes" not in bundled_models(), reason="the bundled model is not in this checkout yet"
)


def a_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


def test_names_find_the_folders_beside_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.weights='bundled:moving_shapes' .* this installation holds none"):
        find_weights("bundled:moving_shapes", tmp_path)
    folder = a_model(tmp_path / MODELS["moving_shapes"])
    assert find_weights("bundled:moving_shapes", tmp_path) == str(folder)
    with pytest.raises(ConfigError, match=r"='bundled:moving_shape' is no bundled model, nearest is 'bundled:moving_s"):
        find_weights("bundled:moving_shape", tmp_path)
    (tmp_path / MODELS["moving_shapes_open_sora_plan"]).mkdir()  # half a folder is no model
    with pytest.raises(ConfigError, match="nearest is 'bundled:moving_shapes'"):
        find_weights("bundled:moving_shapes_open_sora_plan", tmp_path)


@pytest.mark.parametrize("weights", ["owner/name", "some/where", "moving_shapes"])
def test_other_weights_are_left_alone(weights: str) -> None:
    assert find_weights(weights) == weights
    assert open_checkpoint(ModelConfig(weights=weights, revision="x")).location == weights


@needs_model
def test_the_directory_is_small_readable_and_has_a_card() -> None:
    folder = bundled_models()["moving_shapes"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def render(launcher: LocalLauncher, dit: int, vae: int) -> torch.Tensor:
    call = {"num_inference_steps": 4, "output_type": "np", "generator": torch.Generator("cpu").manual_seed(3)}
    with HunyuanVideoPipeline.from_pretrained(
        config=CONFIG, overrides=["runtime.threads_per_rank=1"], dit_ranks=dit, vae_ranks=vae, launcher=launcher
    ) as pipe:
        return torch.as_tensor(pipe(PROMPT, **call).frames)


@needs_model
def test_any_ranks_give_the_clip_of_diffusers(launcher: LocalLauncher) -> None:
    """Twelve heads: seven ranks do not divide them."""
    torch.set_num_threads(1)
    theirs = DiffusersPipeline.from_pretrained(bundled_models()["moving_shapes"], dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 4, "output_type": "np"}

    def reference(prompt: str) -> torch.Tensor:
        return torch.as_tensor(theirs(prompt, **size, generator=torch.Generator("cpu").manual_seed(3)).frames)

    exact = reference(PROMPT)
    assert torch.equal(render(launcher, 1, 1), exact)
    for dit, vae in ((1, 0), (2, 1), (7, 1)):
        assert (render(launcher, dit, vae) - exact).abs().max() <= 1e-5, (dit, vae)
    # the twin: one word of the prompt changes the clip by far more
    assert (reference(PROMPT.replace("red", "green")) - exact).abs().max() > 0.1


@needs_model
def test_clips_show_what_held_out_prompts_say() -> None:
    torch.set_num_threads(1)
    prompts = bench_prompts(12, seed=11, split="held_out", num_objects=1)
    size = ClipSize(num_frames=17, height=64, width=64)
    case = Case(name="exact", steps=20)
    renderer = diffusers_renderer(bundled_models()["moving_shapes"], case, size, torch.device("cpu"), 12)
    clips = list(renderer(prompts))
    result = measure(prompts, lambda _: clips, None)
    shares = {name: a["share"] for name, a in result["accuracy"].items()}
    assert np.mean([shares[name] for name in ("colour", "shape", "size", "motion", "background")]) > 0.8, shares
    # the twin: the clips of other prompts must not pass
    result = measure(prompts, lambda _: [*clips[1:], clips[0]], None)
    assert result["accuracy"]["all"]["share"] < 0.3
