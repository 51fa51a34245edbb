"""The sampler and the mT5 encoder equal what the official code recorded; a clip's steps do what they say."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor
from transformers import MT5Config, MT5EncoderModel

from pipelines import open_sora_plan as steps
from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel, TextContext
from pipelines.models.open_sora_plan_layout import find_folders
from pipelines.models.open_sora_plan_loading import load_transformer
from pipelines.models.zero_snr_scheduler import make_scheduler
from pipelines.open_sora_plan import OpenSoraPlanParts, PromptEmbeds
from tests.osp_recorded import Recorded
from tools.tiny_open_sora_plan import make_open_sora_plan
from videopipe.geometry import VideoSpec

SMALL = VideoSpec(height=48, width=32, num_frames=9, fps=18)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> OpenSoraPlanParts:
    return steps.load_parts(make_open_sora_plan(tmp_path_factory.mktemp("osp") / "tiny"))


def context(parts: OpenSoraPlanParts, prompt: str = "a red fox", guidance_scale: float = 7.5) -> TextContext:
    rows = steps.prompt_rows(prompt, None, guidance_scale)
    return steps.text_context(parts.transformer, steps.encode_prompt(parts.tokenizer, parts.text_encoder, rows, 64))


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# --- scheduler


@pytest.mark.parametrize("count", [100, 50, 30, 7, 1])
def test_recorded_timesteps_and_sigmas(count: int) -> None:
    outputs = Recorded("scheduler_euler_ancestral").part(f"table_{count}/outputs")
    scheduler = make_scheduler()
    scheduler.set_timesteps(count)
    assert torch.equal(scheduler.timesteps, outputs["timesteps"])
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    # processors differ in a product's last bits, and small sigmas, sqrt(1/a - 1), are differences
    torch.testing.assert_close(scheduler.sigmas, outputs["sigmas"], rtol=1e-6, atol=2e-6)
    assert float(scheduler.init_noise_sigma) == pytest.approx(float(outputs["init_noise_sigma"]), rel=1e-6)


def test_sigmas_of_100_steps() -> None:
    scheduler = make_scheduler()
    scheduler.set_timesteps(100)
    expected = torch.tensor([4096, 1478.55664, 706.07611, 449.4567, 321.7902])
    assert torch.allclose(scheduler.sigmas[:5], expected, rtol=1e-6)
    by_timestep = dict(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))
    assert [round(by_timestep[t], 4) for t in (499, 19, 9)] == [3.4861, 0.0764, 0.0437]
    assert scheduler.sigmas[-1] == 0


def trajectory(scheduler: EulerAncestralDiscreteScheduler, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest error against the recorded trajectory, with the recorded noises, relative to each step's largest value.

    Steps begin at 4096 and end at 1: a last bit of the first sigma is 5e-4 of what is left where values cancel.
    """
    recorded = Recorded("scheduler_euler_ancestral").part("trajectory_12")
    noises = list(recorded["inputs/noises"])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *_, **__: noises.pop(0)
    )
    scheduler.set_timesteps(12)
    x, expected, error = recorded["inputs/initial"], recorded["outputs/trajectory"], 0.0
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        v = 0.3 * torch.tanh(scaled) - 0.2 * torch.roll(scaled, 1, dims=-1) + t / 2000
        x = steps.denoise_step(scheduler, x, v, t, torch.Generator())
        error = max(error, worst(x, expected[i + 1]) / float(expected[i + 1].abs().max()))
    assert not noises  # drawn in the last step too
    return error


def test_recorded_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trajectory(make_scheduler(), monkeypatch) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "epsilon"},
        {"timestep_spacing": "leading"},
        {"rescale_betas_zero_snr": False},
        {"beta_schedule": "scaled_linear"},
    ],
    ids=str,
)
def test_other_settings_are_noticed(change: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = EulerAncestralDiscreteScheduler.from_config(make_scheduler().config, **change)
    assert not trajectory(scheduler, monkeypatch) < 1e-3


@pytest.mark.parametrize("count", [*range(1, 130), 201, 206, 217, 223, 284, 285])
def test_as_many_timesteps_as_asked_for(count: int) -> None:
    scheduler = make_scheduler()
    scheduler.set_timesteps(count)
    assert len(scheduler.timesteps) == count == len(scheduler.sigmas) - 1
    for i, t in enumerate(scheduler.timesteps.tolist()):
        assert abs(Fraction(t) - (999 - Fraction(1000 * i, count))) <= Fraction(1, 2)  # a tie may go either way
    assert bool((scheduler.sigmas.diff() < 0).all())


def test_plain_scheduler_has_the_defects() -> None:
    plain = EulerAncestralDiscreteScheduler.from_config(make_scheduler().config)
    plain.set_timesteps(61)
    assert len(plain.timesteps) == 62
    plain.set_timesteps(286)
    assert plain.sigmas[1] > plain.sigmas[0]


@pytest.mark.parametrize(("count", "near"), [(0, 1), (-3, 1), (286, 285), (1000, 285)])
def test_steps_that_cannot_be_sampled(count: int, near: int) -> None:
    for ask in (make_scheduler().set_timesteps, lambda n: steps.check_request(SMALL, n)):
        with pytest.raises(ValueError, match=f"num_inference_steps={count} .* nearest is {near}"):
            ask(count)


# --- text


def test_recorded_mt5_encoder() -> None:
    recorded = Recorded("mt5_tiny")
    model = MT5EncoderModel(MT5Config(**recorded.config)).eval()
    weights = recorded.part("weights")
    model.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]})
    inputs = recorded.part("padded/inputs")
    with torch.no_grad():
        out = model(**inputs).last_hidden_state
        unmasked = model(inputs["input_ids"]).last_hidden_state
    expected = recorded.tensors["padded/outputs/last_hidden_state"]
    assert worst(out, expected) < 1e-5
    assert worst(unmasked, expected) > 1e-2


def test_prompt_rows() -> None:
    negative, positive = steps.prompt_rows("a {curly} cat")
    assert positive == "\n    high quality, high aesthetic, a {curly} cat\n    "
    assert negative.startswith("\n    nsfw, lowres, ")
    assert negative.endswith("worst quality, \n    low quality, normal quality, jpeg artifacts, signature, watermark, "
                             "username, blurry.\n    ")  # fmt: skip
    assert steps.prompt_rows("a cat", guidance_scale=1.0) == steps.prompt_rows("a cat")[1:]
    assert steps.prompt_rows("a cat", "")[0] == ""


def test_encoded_prompts_are_padded_and_masked(parts: OpenSoraPlanParts) -> None:
    text = steps.encode_prompt(parts.tokenizer, parts.text_encoder, ["a red fox", ""], 12)
    assert text.embeds.shape == (2, 1, 12, 48)
    assert text.mask.sum(-1).flatten().tolist() == [4, 1]  # three words and the end token
    cut = steps.encode_prompt(parts.tokenizer, parts.text_encoder, ["a " * 40], 12)
    assert cut.mask.sum() == 12


def test_trimming_masked_text_changes_nothing(parts: OpenSoraPlanParts) -> None:
    text = steps.encode_prompt(parts.tokenizer, parts.text_encoder, ["a red fox", "a"], 40)
    trimmed = steps.trim_text(text)
    assert trimmed.mask.shape == (2, 1, 4)
    latents, t = torch.randn(2, 8, 2, 4, 6), torch.tensor(999.0)
    whole, short = (
        parts.transformer(latents, t, x.embeds, None, x.mask, return_dict=False)[0] for x in (text, trimmed)
    )
    assert worst(whole, short) < 1e-5
    nothing = PromptEmbeds(embeds=text.embeds, mask=torch.zeros_like(text.mask))
    assert steps.trim_text(nothing).mask.shape == text.mask.shape  # all masked: all weigh the same


# --- one clip


def test_guidance() -> None:
    v = torch.randn(2, 8, 1, 2, 2)
    assert worst(steps.guide(v, 7.5), (v[0] + 7.5 * (v[1] - v[0]))[None]) < 1e-6
    assert torch.equal(steps.guide(v[1:], 7.5), v[1:])


def test_rows_can_be_predicted_apart(parts: OpenSoraPlanParts) -> None:
    scheduler = steps.start_scheduler(4)
    latents = steps.initial_latents(SMALL, scheduler, torch.Generator().manual_seed(0))
    text, t = context(parts), scheduler.timesteps[0]
    both = steps.predict(parts.transformer, scheduler, latents, t, text)
    each = [steps.predict(parts.transformer, scheduler, latents, t, text.select(slice(i, i + 1))) for i in (0, 1)]
    assert worst(torch.cat(each), both) < 1e-5
    assert worst(each[0], each[1]) > 1e-3


def test_latents_against_the_formulas(parts: OpenSoraPlanParts) -> None:
    """The whole loop once more, written out: scaling, guidance, the ancestral step, the order of the noise."""
    count, scale = 5, 4.0
    out = steps.denoise(
        parts.transformer, context(parts), SMALL, num_inference_steps=count, guidance_scale=scale,
        generator=torch.Generator().manual_seed(11),
    )  # fmt: skip
    rows = steps.prompt_rows("a red fox")
    text = steps.encode_prompt(parts.tokenizer, parts.text_encoder, rows, 64)
    g = torch.Generator().manual_seed(11)
    table = make_scheduler().alphas_cumprod.double()
    timesteps = [round(1000 - i * 1000 / count) - 1 for i in range(count)]
    sigmas = [float(((1 - table[t]) / table[t]).sqrt()) for t in timesteps] + [0.0]
    x = torch.randn(1, 8, 3, 6, 4, generator=g).double() * sigmas[0]
    for i, t in enumerate(timesteps):
        s, to = sigmas[i], sigmas[i + 1]
        given = (x / (s * s + 1) ** 0.5).float()
        negative, positive = (
            parts.transformer(given, torch.tensor([float(t)]), text.embeds[[r]], None, text.mask[[r]]).sample
            for r in (0, 1)
        )
        v = (negative + scale * (positive - negative)).double()
        x0 = -s / (s * s + 1) ** 0.5 * v + x / (s * s + 1)
        up = (to**2 * (s**2 - to**2) / s**2) ** 0.5
        down = (to**2 - up**2) ** 0.5
        x = x + (x - x0) / s * (down - s) + up * torch.randn(1, 8, 3, 6, 4, generator=g).double()
    assert worst(out, x.float()) < 2e-4
    without = steps.denoise(
        parts.transformer, context(parts), SMALL, num_inference_steps=count, guidance_scale=1.5,
        generator=torch.Generator().manual_seed(11),
    )  # fmt: skip
    assert worst(out, without) > 1e-2


def test_frames(parts: OpenSoraPlanParts) -> None:
    options = {"spec": SMALL, "num_inference_steps": 3, "max_sequence_length": 48}
    frames = steps.render_frames(parts, "a red fox", seed=1, **options)
    assert frames.shape == (9, 48, 32, 3)
    assert frames.dtype == torch.uint8
    assert 15 < frames.float().std() < 100
    assert ((frames == 0) | (frames == 255)).float().mean() < 0.2
    assert torch.equal(steps.render_frames(parts, "a red fox", seed=1, **options), frames)
    chunked = steps.render_frames(parts, "a red fox", seed=1, decode_chunk=1, **options)
    assert (chunked.int() - frames.int()).abs().max() <= 1
    others = [
        steps.render_frames(parts, "two boats", seed=1, **options),
        steps.render_frames(parts, "a red fox", seed=2, **options),
        steps.render_frames(parts, "a red fox", seed=1, negative_prompt="", **options),
        steps.render_frames(parts, "a red fox", seed=1, guidance_scale=1.0, **options),
    ]
    for other in others:
        assert (other.float() - frames.float()).abs().mean() > 1


def test_pixels_are_cut_off_not_rounded(parts: OpenSoraPlanParts) -> None:
    z = torch.randn(1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sample = parts.vae.decode(z / 0.18215).sample
    exact = ((sample / 2 + 0.5).clamp(0, 1) * 255)[0].permute(1, 2, 3, 0)
    frames = torch.cat(list(steps.decode_frames(parts.vae, z))).float()
    assert bool(((exact - frames) > -1e-3).all())
    assert bool(((exact - frames) < 1 + 1e-3).all())
    assert (exact - frames).mean() > 0.4


def test_state_stays_in_fp32_with_a_bf16_model(parts: OpenSoraPlanParts, tmp_path: Path) -> None:
    folders = find_folders(make_open_sora_plan(tmp_path / "m"))
    half: OpenSoraPlanTransformer3DModel = load_transformer(folders.transformer, torch.bfloat16)
    seen: list[torch.dtype] = []
    half.adaln_single.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    text = steps.encode_prompt(parts.tokenizer, parts.text_encoder, ["a"], 8)
    out = steps.denoise(
        half, steps.text_context(half, text), SMALL, num_inference_steps=2, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert out.dtype == torch.float32
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nan_is_named_by_its_first_timestep_after_the_last(parts: OpenSoraPlanParts, bad: int) -> None:
    """Whether the denoiser gave NaN is asked once, for all three steps."""
    calls: list[int] = []

    def spoil(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        return out * float("nan") if calls[-1] == bad else out

    text = steps.text_context(parts.transformer, steps.encode_prompt(parts.tokenizer, parts.text_encoder, ["a"], 8))
    handle = parts.transformer.proj_out.register_forward_hook(spoil)
    try:
        timestep = f"{float(steps.start_scheduler(3).timesteps[bad]):g}"
        with pytest.raises(FloatingPointError, match=f"gave NaN or infinity at timestep {timestep}$"):
            steps.denoise(
                parts.transformer, text, SMALL, num_inference_steps=3, guidance_scale=1.0,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
    finally:
        handle.remove()
    assert len(calls) == 3


def test_nan_of_another_rank_is_named_by_the_last_timestep() -> None:
    check = steps.FiniteCheck()
    latents = torch.zeros(2)
    for t in (999.0, 499.0):
        check.note(latents, torch.tensor(t))
    assert check.finish(latents) is latents
    with pytest.raises(FloatingPointError, match="timestep 499"):
        check.finish(latents / 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 360}, "height=360 must be a multiple of 16, nearest is 368"),
        ({"width": 648}, "width=648 must be a multiple of 16, nearest is 656"),
        ({"num_frames": 92}, r"num_frames=92 must be 1 \+ k\*4, nearest is 93"),
    ],
)
def test_sizes_that_do_not_fit_are_named(parts: OpenSoraPlanParts, change: dict[str, int], message: str) -> None:
    spec = VideoSpec(**({"height": 352, "width": 640, "num_frames": 93} | change))
    with pytest.raises(ValueError, match=message):
        steps.render_frames(parts, "a", spec=spec)


def test_default_size() -> None:
    steps.check_request(steps.DEFAULT_SPEC, steps.DEFAULT_STEPS)
    assert steps.GEOMETRY.latent_shape(steps.DEFAULT_SPEC) == (1, 8, 24, 44, 80)
    assert steps.GEOMETRY.token_grid(steps.DEFAULT_SPEC).video == 21_120
