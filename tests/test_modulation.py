"""Modulation computed ahead gives the same latents with fewer weights on the device."""

from pathlib import Path

import msgspec
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from dit_group.modulation import PrecomputedModulation
from pipelines import HunyuanVideoPipeline
from pipelines.explain import explain_config
from pipelines.hunyuan_video import modulation_parameters
from pipelines.hunyuan_video_parts import modulation_layers
from pipelines.launch import LocalLauncher
from videopipe.config import load_config

CALL = {"height": 64, "width": 48, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent", "seed": 3}


@pytest.mark.parametrize("dit_ranks", [1, 2])
def test_latents_are_bit_equal_with_fewer_weights(
    tiny_checkpoint: Path, launcher: LocalLauncher, dit_ranks: int
) -> None:
    found = {}
    for ahead in ("false", "true"):
        overrides = [f"memory.precompute_modulation={ahead}", "runtime.threads_per_rank=1"]
        with HunyuanVideoPipeline.from_pretrained(
            tiny_checkpoint, dit_ranks=dit_ranks, overrides=overrides, launcher=launcher
        ) as pipe:
            # two requests whose steps interleave with nothing, then one with a second branch
            latents = [
                pipe("a fox", **CALL).frames,
                pipe("a small boat", negative_prompt="blur", true_cfg_scale=3.0, **CALL).frames,
            ]
            found[ahead] = (latents, pipe.engine.weight_bytes[0]["denoiser"])
            explained = explain_config(load_config(msgspec.to_builtins(pipe.config)))
            assert explained.ranks[0].weight_bytes["denoiser"] == found[ahead][1]
    for plain, computed in zip(found["false"][0], found["true"][0], strict=True):
        assert torch.equal(plain, computed)
    assert found["true"][1] < 0.85 * found["false"][1]


def test_the_step_matters(tiny_checkpoint: Path) -> None:
    """The twin: the vectors of another step, or of another branch, are other vectors."""
    model = HunyuanVideoTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    layer = model.transformer_blocks[0].norm1.linear
    names = modulation_layers(model)
    assert len(names) == 2 * 2 + 2 + 1
    modulation = PrecomputedModulation(model, names)
    width = layer.in_features
    vectors = [torch.randn(1, width, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad():
        table = modulation.compute(vectors)
        for step, vector in enumerate(vectors):
            modulation.use(table, step)
            assert torch.equal(model.transformer_blocks[0].norm1.linear(vector), layer(vector))
        modulation.use(table, 0)
        assert not torch.equal(modulation.current(0), layer(vectors[1]))


def test_the_full_model_saves_what_the_paper_counts() -> None:
    """3.42 of 12.8 billion parameters, from the real class without its weights."""
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel()
    total = sum(p.numel() for p in model.parameters())
    modulation = PrecomputedModulation(model, modulation_layers(model))
    left = sum(p.numel() for p in model.parameters())
    assert total == 12_821_012_544
    assert total - left == modulation_parameters({}) == 3_417_372_672
    assert modulation.bytes_saved == 4 * (total - left)  # float32 on the meta device
