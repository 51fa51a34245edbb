"""The demo model trains in resumable steps, whitens exactly, and exports a directory that stock diffusers renders."""

import itertools
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools import demo_training
from tools.demo_model import (
    CROP_START,
    DIT_SHAPES,
    MAX_BYTES,
    TEMPLATE,
    TEXT_TOKENS,
    VAE_SHAPES,
    build_pipeline,
    build_text_encoders,
    build_tokenizers,
    build_transformer,
    build_vae,
    encode_text,
    fold_whitening,
    num_parameters,
    tokenize,
)
from tools.demo_training import Compute, Recipe, learning_rate, open_log, open_run, save_atomic
from tools.demo_training_program import slim, start_from
from tools.demo_training_stages import (
    VaeBatches,
    _reconstruction_loss,
    cache_latents,
    cached_scene,
    finish_vae,
    noise_levels,
    to_input,
    train_decoder,
    train_vae,
    vae_loss,
)
from tools.moving_shapes import caption, is_held_out, render, scene_at
from tools.train_demo_model import HUNYUAN_VAE, PROGRAM, PlainAttention, main, moments_of, train_dit


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "seed": 3,
        "vae": "tiny",
        "dit": "tiny",
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "vae_iterations": 6,
        "dit_iterations": 6,
        "batch_scale": 0.06,
        "vae_lr": 1e-3,
        "dit_lr": 1e-3,
        "cached_clips": 16,
    }
    return Recipe(**{**values, **changes})


def _compute(stop_after: int | None = None, workers: int = 0) -> Compute:
    return Compute(
        device=torch.device("cpu"),
        workers=workers,
        deadline=math.inf,
        checkpoint_s=math.inf,
        eval_s=math.inf,
        eval_prompts=2,
        stop_after=stop_after,
    )


def _flat(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested checkpoint by its path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items: Any = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {path: t for key, value in items for path, t in _flat(value, f"{prefix}/{key}").items()}


def _assert_same_checkpoint(first: Path, second: Path) -> None:
    one, two = (_flat(torch.load(f, weights_only=True)) for f in (first, second))
    assert one.keys() == two.keys()
    assert len(one) > 100
    for path, tensor in one.items():
        assert torch.equal(tensor, two[path]), path


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages in one go."""
    run = tmp_path_factory.mktemp("whole")
    assert train_vae(HUNYUAN_VAE, run, _recipe(), _compute())
    assert train_dit(run, _recipe(), _compute(), True)
    return run


def test_interrupted_training_ends_in_the_same_weights(whole_run: Path, tmp_path: Path) -> None:
    assert not train_vae(HUNYUAN_VAE, tmp_path, _recipe(), _compute(stop_after=4))
    assert train_vae(HUNYUAN_VAE, tmp_path, _recipe(), _compute())
    _assert_same_checkpoint(whole_run / "vae.ckpt", tmp_path / "vae.ckpt")
    assert not train_dit(tmp_path, _recipe(), _compute(stop_after=1), True)
    assert not train_dit(tmp_path, _recipe(), _compute(stop_after=3), True)
    assert train_dit(tmp_path, _recipe(), _compute(), True)
    _assert_same_checkpoint(whole_run / "dit.ckpt", tmp_path / "dit.ckpt")


def test_forgotten_optimizer_state_is_noticed(whole_run: Path, tmp_path: Path) -> None:
    """The twin: without the moments (a slim checkpoint) the resumed weights must differ."""
    run = tmp_path / "run"
    run.mkdir()
    assert not train_vae(HUNYUAN_VAE, run, _recipe(), _compute(stop_after=4))
    slim(run, tmp_path / "slim")
    assert (tmp_path / "slim" / "vae.ckpt").stat().st_size < 0.4 * (run / "vae.ckpt").stat().st_size
    assert train_vae(HUNYUAN_VAE, tmp_path / "slim", _recipe(), _compute())
    one, two = (torch.load(d / "vae.ckpt", weights_only=True)["ema"] for d in (whole_run, tmp_path / "slim"))
    assert not all(torch.equal(one[k], two[k]) for k in one)


def test_another_seed_gives_other_weights(whole_run: Path, tmp_path: Path) -> None:
    assert train_vae(HUNYUAN_VAE, tmp_path, _recipe(seed=4), _compute())
    one, two = (torch.load(d / "vae.ckpt", weights_only=True)["ema"] for d in (whole_run, tmp_path))
    assert not any(torch.equal(one[k], two[k]) for k in one if k.endswith("conv.weight"))


@pytest.mark.slow
def test_worker_processes_give_the_same_weights(whole_run: Path, tmp_path: Path) -> None:
    assert train_vae(HUNYUAN_VAE, tmp_path, _recipe(), _compute(workers=2))
    _assert_same_checkpoint(whole_run / "vae.ckpt", tmp_path / "vae.ckpt")


def test_curves_forget_what_a_resume_repeats(tmp_path: Path) -> None:
    file = tmp_path / "curves.jsonl"
    entries = [("vae", 50), ("vae", 100), ("vae", 150), ("dit", 150)]
    file.write_text("".join(json.dumps({"stage": s, "iteration": i}) + "\n" for s, i in entries))
    log = open_log(tmp_path, "vae", 100)
    log({"iteration": 150, "loss": 1.0})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(x["stage"], x["iteration"]) for x in lines] == [("vae", 50), ("vae", 100), ("dit", 150), ("vae", 150)]


def test_checkpoint_is_replaced_at_once(tmp_path: Path) -> None:
    file = tmp_path / "vae.ckpt"
    save_atomic({"iteration": 1}, file)

    class Unwritable:
        def __reduce__(self) -> Any:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_atomic({"iteration": Unwritable()}, file)
    assert torch.load(file, weights_only=True) == {"iteration": 1}


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    vae = build_vae("tiny")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    video = VaeBatches(_recipe(batch_scale=0.2))(0)
    losses = []
    for step in range(25):
        loss, _ = vae_loss(HUNYUAN_VAE, vae, video, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_only_trained_combinations_are_trained_on() -> None:
    recipe = _recipe(cached_clips=150, cached_pairs=50)
    scenes = [cached_scene(recipe, i) for i in range(200)]
    assert all(len(s.objects) == 2 for s in scenes[150:])
    assert len({len(s.objects) for s in scenes[:150]}) == 2
    assert not any(is_held_out(t) for s in scenes for t in s.objects)


# --- whitening --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_whitening_is_exact() -> None:
    torch.manual_seed(0)
    vae = build_vae("tiny").double()
    torch.nn.init.normal_(vae.quant_conv.bias)
    video = torch.rand(4, 3, 5, 32, 32, dtype=torch.float64) * 2 - 1
    before = vae.encode(video).latent_dist
    decoded = vae.decode(before.mode()).sample
    mean, std = before.mode().mean((0, 2, 3, 4)), before.mode().std((0, 2, 3, 4))
    fold_whitening(vae, mean, std)
    after = vae.encode(video).latent_dist
    torch.testing.assert_close(after.mode().mean((0, 2, 3, 4)), torch.zeros_like(mean), atol=1e-10, rtol=0)
    torch.testing.assert_close(after.mode().std((0, 2, 3, 4)), torch.ones_like(std), atol=1e-10, rtol=0)
    torch.testing.assert_close(after.std, before.std / std.view(1, -1, 1, 1, 1), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(vae.decode(after.mode()).sample, decoded, atol=1e-10, rtol=0)


@torch.no_grad()
def test_half_folded_whitening_is_noticed() -> None:
    """The twin: folding into the encoder alone changes the pictures."""
    torch.manual_seed(0)
    vae = build_vae("tiny").double()
    video = torch.rand(2, 3, 5, 32, 32, dtype=torch.float64) * 2 - 1
    latents = vae.encode(video).latent_dist.mode()
    decoded = vae.decode(latents).sample
    back = {k: v.clone() for k, v in vae.post_quant_conv.state_dict().items()}
    fold_whitening(vae, latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
    vae.post_quant_conv.load_state_dict(back)
    assert (vae.decode(vae.encode(video).latent_dist.mode()).sample - decoded).abs().max() > 1e-3


def test_a_dead_latent_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"std=0.0 of a latent channel must be positive"):
        fold_whitening(build_vae("tiny"), torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_finished_vae_gives_whitened_latents(whole_run: Path) -> None:
    latents = load_file(whole_run / "latents.safetensors")["latents"].float()
    assert latents.shape == (16, 4, 2, 4, 4)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.5
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.5


def test_a_cache_grows_without_being_made_again(whole_run: Path, tmp_path: Path) -> None:
    vae = finish_vae(HUNYUAN_VAE, whole_run, _recipe(), _compute(), accept=True)
    whole = cache_latents(HUNYUAN_VAE, vae, tmp_path, _recipe(cached_clips=32), _compute())
    (tmp_path / "latents.safetensors").unlink()
    marked = cache_latents(HUNYUAN_VAE, vae, tmp_path, _recipe(cached_clips=16), _compute()).zero_()
    save_file({"latents": marked}, tmp_path / "latents.safetensors")
    grown = cache_latents(HUNYUAN_VAE, vae, tmp_path, _recipe(cached_clips=32), _compute())
    assert torch.equal(grown, torch.cat([marked, whole[16:]]))
    assert torch.equal(cache_latents(HUNYUAN_VAE, vae, tmp_path, _recipe(cached_clips=24), _compute()), grown[:24])
    assert len(load_file(tmp_path / "latents.safetensors")["latents"]) == 32


def test_pairs_lie_behind_the_clips_of_a_cache(whole_run: Path, tmp_path: Path) -> None:
    vae = finish_vae(HUNYUAN_VAE, whole_run, _recipe(), _compute(), accept=True)

    def cached(clips: int, pairs: int) -> Tensor:
        return cache_latents(HUNYUAN_VAE, vae, tmp_path, _recipe(cached_clips=clips, cached_pairs=pairs), _compute())

    clips = cached(16, 0)
    both = cached(16, 8)
    assert torch.equal(both[:16], clips)
    more = cached(32, 16)  # each of the two grows on its own
    assert torch.equal(more[:16], clips) and torch.equal(more[32:40], both[16:])
    recipe = _recipe(cached_clips=32, cached_pairs=16)
    real = render(cached_scene(recipe, 32 + 8), 5, 32, 32)
    mean, _ = moments_of(vae, to_input(real[None]))
    assert (more[40].float() - mean[0]).abs().max() < 0.1  # bfloat16 arithmetic
    assert (more[39].float() - mean[0]).abs().max() > 0.5  # the twin: another scene


def test_a_vae_below_its_targets_is_not_trained_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no vae.ckpt: train with --stage vae first"):
        finish_vae(HUNYUAN_VAE, tmp_path, _recipe(), _compute(), accept=False)
    train_vae(HUNYUAN_VAE, tmp_path, _recipe(), _compute(stop_after=1))
    with pytest.raises(ValueError, match=r"of the VAE: need 30.0 dB and 0.97; train it longer"):
        finish_vae(HUNYUAN_VAE, tmp_path, _recipe(), _compute(), accept=False)
    assert not (tmp_path / "vae.safetensors").exists()


def test_a_decoder_goes_on_without_moving_the_latents(whole_run: Path, tmp_path: Path) -> None:
    """Else a DiT that was trained on them would have to be trained again."""
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"holds no vae.safetensors: train with --stage dit first"):
        train_decoder(HUNYUAN_VAE, run, _recipe(), _compute(), 2)
    slim(whole_run, run)
    before = load_file(run / "vae.safetensors")
    assert not train_decoder(HUNYUAN_VAE, run, _recipe(), _compute(stop_after=1), 2)
    assert train_decoder(HUNYUAN_VAE, run, _recipe(), _compute(), 2)
    after = load_file(run / "vae.safetensors")
    assert before.keys() == after.keys()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}
    about = json.loads((run / "vae.json").read_text())
    assert (about["iteration"], about["decoder_iteration"]) == (6, 2)


def test_noise_in_the_latents_is_measured_by_their_spread(whole_run: Path, tmp_path: Path) -> None:
    weights = []
    for noise in (0.0, 0.0, 0.5):
        run = tmp_path / str(len(weights))
        slim(whole_run, run)
        assert train_decoder(HUNYUAN_VAE, run, _recipe(), _compute(), 1, latent_noise=noise)
        weights.append(load_file(run / "vae.safetensors")["decoder.conv_out.conv.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match=r"latent_noise=-0.1 must be at least 0, nearest is 0"):
        main(_arguments(tmp_path / "0", "--stage", "decoder", "--latent-noise", "-0.1"))


def test_a_louder_channel_gets_louder_noise() -> None:
    """Ten times the latents, ten times the noise: the decoder sees the same relative error in every channel."""
    seen: list[Tensor] = []
    kind = replace(HUNYUAN_VAE, decode=lambda vae, z: (seen.append(z), torch.zeros(8, 3, 1, 16, 16))[1])
    mean = torch.randn(8, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean[:, 1] *= 10
    for noise in (0.0, 0.4):
        generator = torch.Generator().manual_seed(1)
        certain = torch.full_like(mean, -60.0)
        _reconstruction_loss(kind, torch.nn.Identity(), torch.zeros(8, 3, 1, 16, 16), mean, certain, generator, noise)
    assert torch.allclose(seen[0], mean)
    added = (seen[1] - mean).std((0, 2, 3, 4))
    assert added[1] / added[0] == pytest.approx(10, rel=0.2)
    assert 0.05 < added[0] < 0.4  # uniform up to 0.4, one amount for a clip


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    return build_tokenizers()


def test_template_prefix_has_the_tokens_that_the_pipeline_cuts(tokenizers: tuple[Any, Any]) -> None:
    tokenizer = tokenizers[0]
    ids = tokenizer(TEMPLATE.format("a red ball")).input_ids
    rest = tokenizer.decode(ids[CROP_START:])
    assert rest == "a red ball<|eot_id|>"
    assert "a red ball" not in tokenizer.decode(ids[: CROP_START + 1])


def test_every_caption_fits_and_any_text_survives(tokenizers: tuple[Any, Any]) -> None:
    tokenizer, tokenizer_2 = tokenizers
    rng = np.random.default_rng(0)
    captions = [caption(scene_at(8, i, split="any"), rng) for i in range(500)]
    assert max(len(tokenizer.tokenize(c)) for c in captions) + 1 <= TEXT_TOKENS  # one for <|eot_id|>
    assert max(len(tokenizer_2(c).input_ids) for c in captions) <= 77
    for text in ("Ein Würfel, 3 Bälle; \n 雪 🦊", captions[0]):
        assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text
    assert tokenizer_2.eos_token_id != 2  # CLIP's legacy pooling


@torch.no_grad()
def test_training_text_equals_the_pipelines_text(tokenizers: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tokenizers
    llama, clip = build_text_encoders("tiny", tokenizer, tokenizer_2)
    vae = build_vae("tiny")
    dit = build_transformer("tiny", 4)
    pipe = build_pipeline(
        vae=vae, transformer=dit, llama=llama, clip=clip, tokenizer=tokenizer, tokenizer_2=tokenizer_2
    )
    prompts = ["a red ball bounces", ""]
    text, mask, pooled = encode_text(llama, clip, tokenize(prompts, tokenizer, tokenizer_2))
    wanted, wanted_pooled, wanted_mask = pipe.encode_prompt(prompt=prompts)  # the pipeline's own 256 places
    assert torch.equal(mask.sum(1), wanted_mask.sum(1))
    for row in range(2):
        valid = int(mask[row].sum())
        torch.testing.assert_close(text[row, :valid], wanted[row, :valid], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pooled, wanted_pooled)
    assert not torch.equal(pooled[0], pooled[1])


# --- the DiT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True])
def test_training_attention_equals_the_models_own(broken: bool) -> None:
    """Forward and gradients in float64; the twin forgets which text tokens are padding."""
    torch.manual_seed(0)
    dit = build_transformer("tiny", 4).double()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4, dtype=torch.float64),
        "timestep": torch.tensor([100.0, 700.0], dtype=torch.float64),
        "encoder_hidden_states": torch.randn(2, 5, 16, dtype=torch.float64),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "pooled_projections": torch.randn(2, 16, dtype=torch.float64),
        "guidance": torch.tensor([6000.0, 6000.0], dtype=torch.float64),
    }
    results = []
    for own in (True, False):
        if not own:
            for block in (*dit.transformer_blocks, *dit.single_transformer_blocks):
                block.attn.set_processor(PlainAttention())
            if broken:
                inputs["encoder_attention_mask"] = torch.ones(2, 5, dtype=torch.int64)
        out = dit(**inputs, return_dict=False)[0]
        dit.zero_grad()
        torch.autograd.backward(out.square().sum())
        grads = [p.grad for p in dit.parameters() if p.grad is not None]
        results.append((out.detach(), torch.cat([g.flatten() for g in grads])))
    same = all(torch.allclose(a, b, rtol=1e-8, atol=1e-8 * float(a.abs().max())) for a, b in zip(*results, strict=True))
    assert same != broken


def test_annealing_follows_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of the last iteration: low where the time was nearly over, the schedule's own where it was not."""
    recipe = _recipe(vae_iterations=100_000)
    rates = []
    for name, seconds in (("long", 1e6), ("short", 20.0)):
        (tmp_path / name).mkdir()
        ticks = itertools.count()  # a clock of our own: a second passes whenever somebody looks at it
        monkeypatch.setattr(demo_training, "time", SimpleNamespace(monotonic=lambda t=ticks: float(next(t))))
        compute = replace(_compute(), anneal=True, deadline=seconds, checkpoint_s=1e9, eval_s=1e9)
        compute = replace(compute, stop_after=3 if name == "long" else None)
        assert not train_vae(HUNYUAN_VAE, tmp_path / name, recipe, compute)
        state = torch.load(tmp_path / name / "vae.ckpt", weights_only=True)
        rates.append(
            state["optimizer"][0]["param_groups"][0]["lr"] / learning_rate(1e-3, state["iteration"] - 1, 100_000, 0.5)
        )
    assert rates[0] == pytest.approx(1.0, rel=1e-6)
    assert rates[1] < 0.3


def test_noise_levels_match_the_shift() -> None:
    sigma = noise_levels(20000, torch.Generator().manual_seed(0))
    assert 0 < sigma.min() < sigma.max() < 1
    assert abs(float(sigma.median()) - 2 / 3) < 0.02  # shift 2 moves a half to two thirds


def test_early_noise_levels_are_where_sampling_begins() -> None:
    few, many = (noise_levels(20000, torch.Generator().manual_seed(0), early=share) for share in (0.0, 0.4))
    assert 0 < many.min() < many.max() < 1
    assert (few > 0.95).float().mean() < 0.03
    assert (many > 0.95).float().mean() > 0.1
    assert (few != many).float().mean() == pytest.approx(0.4, abs=0.02)


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(1.0, i, 1000, 0.6) for i in range(1000)]
    assert rates[0] < 0.02
    assert rates[100] == rates[600] == 1.0
    assert rates[-1] < 0.03
    assert all(a >= b for a, b in itertools.pairwise(rates[600:]))


def test_shipped_sizes_fit_the_limit_and_have_odd_heads(tokenizers: tuple[Any, Any]) -> None:
    dit = build_transformer("base", 16)
    parameters = num_parameters(build_vae("wide"), dit, *build_text_encoders("base", *tokenizers))
    assert 2 * parameters < MAX_BYTES - 200_000
    assert DIT_SHAPES["base"].heads in (6, 12, 24)
    assert sum(DIT_SHAPES["base"].rope) == DIT_SHAPES["base"].head_dim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 16}, r"num_frames=16 must be 1 \+ 4\*k and at least 5, nearest is 17"),
        ({"height": 40}, r"height=40 must be a multiple of 16, at least 32, nearest is 32"),
        ({"batch_scale": 0.0}, r"batch_scale=0.0 must be positive"),
        ({"cached_pairs": -1}, r"cached_pairs=-1 must be at least 0, nearest is 0"),
        ({"vae": "huge"}, r"vae='huge' must be one of tiny, small, wide, stock, nearest is 'small'"),
    ],
)
def test_recipes_that_cannot_train_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _recipe(**change).check(VAE_SHAPES, DIT_SHAPES)


# --- the exported directory ---------------------------------------------------------------------------------------


def _arguments(run: Path, *more: str) -> list[str]:
    sizes = ["--vae", "tiny", "--dit", "tiny", "--frames", "5", "--height", "32", "--width", "32", "--seed", "3"]
    amounts = ["--vae-iterations", "2", "--dit-iterations", "2", "--batch-scale", "0.06"]
    amounts += ["--cached-clips", "16", "--cached-pairs", "8"]
    return ["--run", str(run), *sizes, *amounts, "--eval-prompts", "2", "--threads", "1", *more]


def test_export_renders_with_stock_diffusers_and_default_arguments(whole_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    open_run(whole_run, _recipe())
    assert main(_arguments(whole_run, "--stage", "export", "--export", str(out))) == 0
    sizes = {f.relative_to(out).as_posix(): f.stat().st_size for f in out.rglob("*") if f.is_file()}
    assert sum(sizes.values()) <= MAX_BYTES
    assert {"README.md", "model_index.json", "transformer/diffusion_pytorch_model.safetensors"} <= sizes.keys()
    weights = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    card = (out / "README.md").read_text()
    assert "6 VAE and 6 DiT iterations, seed 3" in card
    assert "5 frames of 32x32" in card

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = HunyuanVideoPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe.tokenizer(TEMPLATE.format("a red ball")).input_ids
    assert pipe.tokenizer.decode(tokens[CROP_START:]) == "a red ball<|eot_id|>"

    def video(**changes: Any) -> np.ndarray[Any, Any]:
        values: dict[str, Any] = {"prompt": "a red ball", "height": 32, "width": 32, "num_frames": 5, **changes}
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipe(**values, num_inference_steps=2, generator=generator, output_type="np").frames)

    first = video()
    assert first.shape == (1, 5, 32, 32, 3)
    assert np.isfinite(first).all()
    assert np.array_equal(first, video(guidance_scale=1.0))  # the embedded guidance is trained to nothing
    assert not np.array_equal(first, video(prompt="a blue bar"))
    # exporting again replaces it; another directory is not touched
    assert main(_arguments(whole_run, "--stage", "export", "--export", str(out))) == 0
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match=r"exists and holds no model_index\.json"):
        main(_arguments(whole_run, "--stage", "export", "--export", str(tmp_path / "precious")))


def test_training_goes_on_from_an_exported_pipeline(whole_run: Path, tmp_path: Path) -> None:
    """What is shipped is enough to go on: the weights, rounded as they were shipped, and how far they had come."""
    open_run(whole_run, _recipe())
    out, run = tmp_path / "model", tmp_path / "run"
    assert main(_arguments(whole_run, "--stage", "export", "--export", str(out))) == 0
    start_from(PROGRAM, out, run, _recipe(dit_iterations=8))
    before = torch.load(whole_run / "dit.ckpt", weights_only=True)["ema"]
    taken = torch.load(run / "dit.ckpt", weights_only=True)
    assert taken["iteration"] == 6
    assert taken["ema"].keys() == before.keys()
    for key, value in taken["ema"].items():
        assert torch.equal(value, before[key].bfloat16().float()), key
    assert train_dit(run, _recipe(dit_iterations=8), _compute(), False)
    assert torch.load(run / "dit.ckpt", weights_only=True)["iteration"] == 8
    again = tmp_path / "again"
    assert main(_arguments(run, "--stage", "export", "--export", str(again))) == 0
    assert "6 VAE and 8 DiT iterations, seed 3" in (again / "README.md").read_text()
    with pytest.raises(ValueError, match="already holds a run: leave out --start-from"):
        start_from(PROGRAM, out, run, _recipe())
    with pytest.raises(ValueError, match=r"holds no training\.json: name a directory that --export wrote"):
        start_from(PROGRAM, tmp_path, tmp_path / "other", _recipe())
    with pytest.raises(ValueError, match=r"seed=4 differs from 3"):
        start_from(PROGRAM, out, tmp_path / "other", _recipe(seed=4))


def test_command_line_resumes_only_when_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(_arguments(run, "--stage", "vae")) == 0
    with pytest.raises(ValueError, match="already holds a run: pass --resume"):
        main(_arguments(run, "--stage", "vae"))
    with pytest.raises(ValueError, match=r"seed=9 differs from 3 of this run"):
        main(_arguments(run, "--stage", "vae", "--resume", "--seed", "9"))
    assert main(_arguments(run, "--stage", "vae", "--resume", "--vae-iterations", "3")) == 0
    assert torch.load(run / "vae.ckpt", weights_only=True)["iteration"] == 3
    assert (
        main(_arguments(run, "--stage", "vae", "--resume", "--vae-iterations", "9", "--anneal", "--minutes", "9")) == 0
    )
    with pytest.raises(ValueError, match="anneal=True needs --minutes"):
        main(_arguments(run, "--stage", "vae", "--resume", "--anneal"))
    with pytest.raises(ValueError, match="stage='export' needs --export DIRECTORY"):
        main(_arguments(run, "--stage", "export"))
