"""Where two runs part: the first step, tensor and block, between recordings of real denoisers."""

import inspect
import json

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipelines.compare_cli import app
from videopipe.quality.recorder import StepRecorder, block_modules
from videopipe.quality.trace import recorded_steps, trace, write_step

HEADS, HEAD_DIM = 4, 8


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))  # modulation starts at zero: blocks would do nothing
    return model.eval()


@pytest.fixture(scope="module")
def pipe(transformer):
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def render(pipe, folder, *, block_steps=(), seed=0, valid=5, length=7):
    """Three steps of diffusers' own pipeline, recorded. `valid` of `length` text tokens are real."""
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    embeds = torch.randn((1, 12, 16), generator=draw)[:, :length]
    pooled = torch.randn((1, 8), generator=draw)
    mask = (torch.arange(length) < valid).long()[None]
    with StepRecorder(folder, pipe.transformer, block_steps=block_steps) as recorder:
        pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            prompt_attention_mask=mask,
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=recorder.on_step_end,
            callback_on_step_end_tensor_inputs=["latents"],
        )
    return folder


class WrongHeadOrder:
    """An attention processor that hands the heads of the result back in reverse."""

    def __init__(self, inner):
        self._inner = inner

    def __call__(self, attn, *args, **kwargs):
        video, text = self._inner(attn, *args, **kwargs)
        return video.unflatten(2, (HEADS, HEAD_DIM)).flip(2).flatten(2), text


@pytest.fixture(scope="module")
def reference(pipe, tmp_path_factory):
    return render(pipe, tmp_path_factory.mktemp("ref") / "a.steps", block_steps={0, 2})


def test_the_same_run_has_nothing_to_find(pipe, reference, tmp_path):
    again = trace(reference, render(pipe, tmp_path / "a.steps", block_steps={0, 2}))
    assert (again.first, again.num_steps) == (None, 3)
    assert again.compared == 3 * 2 + 2 * 4 * 2  # latents and prediction; four blocks with two outputs in two steps
    assert again.lines() == ("recorded steps: all 22 tensors of 3 steps are equal",)


@pytest.mark.parametrize(
    ("block", "step"), [("transformer_blocks.0", 0), ("transformer_blocks.1", 0), ("single_transformer_blocks.1", 0)]
)
def test_wrong_head_order_is_traced_to_its_block(pipe, reference, tmp_path, block, step):
    attention = pipe.transformer.get_submodule(block).attn
    right = attention.processor
    attention.set_processor(WrongHeadOrder(right))
    try:
        found = trace(reference, render(pipe, tmp_path / "a.steps", block_steps={0, 2})).first
    finally:
        attention.set_processor(right)
    assert (found.step, found.block, found.reason) == (step, block, "value")
    assert found.rel_l2 > 1e-4


def test_another_seed_differs_from_the_first_block(pipe, reference, tmp_path):
    found = trace(reference, render(pipe, tmp_path / "a.steps", block_steps={0, 2}, seed=1)).first
    assert (found.step, found.block) == (0, "transformer_blocks.0")


def test_padded_text_is_compared_on_the_common_tokens(pipe, tmp_path):
    trimmed = render(pipe, tmp_path / "a.steps", block_steps={0, 2}, valid=7, length=7)
    padded = render(pipe, tmp_path / "b.steps", block_steps={0, 2}, valid=7, length=12)
    found = trace(trimmed, padded, tolerance=1e-4).first
    assert (found.name, found.reason) == ("pass.0/transformer_blocks.0/1", "shape")
    assert trace(trimmed, padded, tolerance=1e-4, trim=True).first is None
    longer = render(pipe, tmp_path / "c.steps", block_steps={0, 2}, valid=8, length=12)
    assert trace(trimmed, longer, tolerance=1e-4, trim=True).first.block == "transformer_blocks.0"


def test_recording_changes_nothing_and_leaves_no_hook(pipe, transformer, tmp_path):
    latents = [render(pipe, tmp_path / f"{n}.steps", block_steps=steps) for n, steps in (("a", ()), ("b", {0, 1, 2}))]
    ends = [recorded_steps(folder)[2] for folder in latents]
    assert trace_of_latents(*ends)
    assert not transformer._forward_hooks
    assert not any(block._forward_hooks for block in block_modules(transformer).values())


def trace_of_latents(a, b):
    from safetensors.torch import load_file

    return torch.equal(load_file(a)["latents"], load_file(b)["latents"])


def test_the_earliest_tensor_counts_whatever_its_name(tmp_path):
    first, second = torch.zeros(3), torch.ones(3)
    write_step(tmp_path / "a.steps", 0, {"zz": first, "aa": second})
    write_step(tmp_path / "b.steps", 0, {"zz": first + 1, "aa": second + 1})
    assert trace(tmp_path / "a.steps", tmp_path / "b.steps").first.name == "zz"


def test_tolerance_passes_small_differences_and_says_so(tmp_path):
    value = torch.linspace(1, 2, 64)
    nearly = value.clone()
    nearly[7] *= 1 + 1e-5
    write_step(tmp_path / "a.steps", 0, {"latents": value})
    write_step(tmp_path / "b.steps", 0, {"latents": nearly})
    strict, loose = (trace(tmp_path / "a.steps", tmp_path / "b.steps", tolerance=t) for t in (0.0, 1e-5))
    assert strict.first.index == (7,)
    assert (loose.first, loose.first_bitwise.index) == (None, (7,))
    assert "first not bit-equal: step 0, tensor latents" in loose.lines()[1]


@pytest.mark.parametrize(
    ("cand", "reason"),
    [
        (torch.full((2, 3), float("nan")), "not finite"),
        (torch.zeros(2, 4), "shape"),
        (torch.zeros((2, 3), dtype=torch.int64), "dtype"),
        (None, "missing"),
    ],
)
def test_other_differences_are_named(tmp_path, cand, reason):
    write_step(tmp_path / "a.steps", 0, {"x": torch.zeros(2, 3), "y": torch.zeros(1)})
    write_step(tmp_path / "b.steps", 0, {"y": torch.zeros(1)} if cand is None else {"x": cand, "y": torch.zeros(1)})
    found = trace(tmp_path / "a.steps", tmp_path / "b.steps").first
    assert (found.name, found.reason) == ("x", reason)


def test_a_missing_step_and_foreign_files_are_named(tmp_path):
    for step in (0, 1):
        write_step(tmp_path / "a.steps", step, {"latents": torch.zeros(1)})
    write_step(tmp_path / "b.steps", 0, {"latents": torch.zeros(1)})
    found = trace(tmp_path / "a.steps", tmp_path / "b.steps").first
    assert (found.step, found.reason, found.detail) == (1, "missing", "not recorded in CAND")
    (tmp_path / "c.steps").mkdir()
    with pytest.raises(ValueError, match="holds no recorded steps"):
        trace(tmp_path / "a.steps", tmp_path / "c.steps")
    save_file({"latents": torch.zeros(1)}, tmp_path / "c.steps" / "step_0000.safetensors")
    with pytest.raises(ValueError, match=r"format=None must be 'videopipe.steps/1'"):
        trace(tmp_path / "a.steps", tmp_path / "c.steps")
    with pytest.raises(ValueError, match="tolerance=-1 must be at least 0"):
        trace(tmp_path / "a.steps", tmp_path / "b.steps", tolerance=-1)


def test_recorder_refuses_wrong_use(tmp_path, transformer, reference):
    with pytest.raises(ValueError, match="holds a recording already"):
        StepRecorder(reference, transformer)
    with pytest.raises(ValueError, match="Linear has no module list of blocks"):
        StepRecorder(tmp_path / "x.steps", torch.nn.Linear(1, 1), block_steps={0})
    with StepRecorder(tmp_path / "x.steps", transformer) as recorder, pytest.raises(ValueError, match="must hold"):
        recorder.on_step_end(None, 0, None, {})


def test_the_recorder_fits_diffusers_callback():
    callback = inspect.signature(HunyuanVideoPipeline.__call__).parameters
    assert {"callback_on_step_end", "callback_on_step_end_tensor_inputs"} <= set(callback)
    assert "latents" in HunyuanVideoPipeline._callback_tensor_inputs


def test_the_command_line_traces_recordings_beside_clips(pipe, reference, tmp_path):
    for name, run in (("ref", 0), ("cand", 1)):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"latents": torch.full((1, 4, 2, 4, 6), float(run))}, folder / "a.safetensors")
        write_step(folder / "a.steps", 0, {"pass.0/transformer_blocks.0/0": torch.ones(2), "latents": torch.ones(2)})
        write_step(folder / "a.steps", 1, {"pass.0/transformer_blocks.0/0": torch.ones(2) + run})
    arguments = [str(tmp_path / side / "a.safetensors") for side in ("ref", "cand")]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "o.json")])
    assert result.exit_code == 0, result.output
    assert "runs part at step 1, block transformer_blocks.0" in " ".join(result.output.split())
    found = json.loads((tmp_path / "o.json").read_text())["trace"]
    assert (found["first_different_step"], found["first_different_block"]) == (1, "transformer_blocks.0")
    only = CliRunner().invoke(app, [str(reference), str(reference), "--expect", "identical"])
    assert only.exit_code == 0, only.output
    folders = [str(tmp_path / side / "a.steps") for side in ("ref", "cand")]
    assert CliRunner().invoke(app, [*folders, "--expect", "identical"]).exit_code == 1
