"""The second demo model trains in resumable steps, and exports a directory that OpenSoraPlanPipeline renders."""

import itertools
import math
import string
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from pipelines import OpenSoraPlanPipeline
from pipelines.launch import LocalLauncher
from pipelines.models.open_sora_plan import skip_sparse_attention
from pipelines.models.open_sora_plan_loading import load_tokenizer
from pipelines.models.skip_sparse import SkipSparse
from pipelines.models.zero_snr_scheduler import make_scheduler
from pipelines.open_sora_plan import (
    NEGATIVE_PROMPT,
    denoise_step,
    encode_prompt,
    initial_latents,
    load_parts,
    prompt_rows,
    render_frames,
    start_scheduler,
)
from tests.demo_models import tiny_open_sora_plan
from tools.demo_model import num_parameters
from tools.demo_open_sora_plan import (
    DIT_SHAPES,
    MAX_BYTES,
    TEXT_TOKENS,
    VAE_SHAPES,
    build_text_encoder,
    build_transformer,
    build_vae,
    moments_of,
    tokenize,
    video_of,
    with_whitening,
    write_tokenizer,
)
from tools.demo_training import Compute, Recipe, open_run
from tools.demo_training_program import slim, start_from
from tools.demo_training_stages import DitBatches, finish_vae, noise_levels, train_decoder, train_vae, vae_loss
from tools.moving_shapes import caption, render, scene_at
from tools.train_demo_open_sora_plan import (
    PROGRAM,
    WF_VAE,
    _prompt_or_nothing,
    dit_loss,
    export,
    main,
    plain_attention,
    prepare_for_cpu,
    timesteps,
    train_dit,
)
from videopipe.geometry import VideoSpec

SPEC = VideoSpec(height=32, width=32, num_frames=5)


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
        "num_frames": SPEC.num_frames,
        "height": SPEC.height,
        "width": SPEC.width,
        "vae_iterations": 5,
        "dit_iterations": 6,
        "batch_scale": 0.06,
        "vae_lr": 1e-3,
        "dit_lr": 1e-3,
        "cached_clips": 16,
    }
    return Recipe(**{**values, **changes})


def _compute(stop_after: int | None = None) -> Compute:
    return Compute(
        device=torch.device("cpu"),
        workers=0,
        deadline=math.inf,
        checkpoint_s=math.inf,
        eval_s=math.inf,
        eval_prompts=2,
        stop_after=stop_after,
    )


def _tensors(file: Path) -> list[torch.Tensor]:
    state = torch.load(file, weights_only=True)
    leaves = tree_leaves({key: value for key, value in state.items() if key != "seconds"})
    return [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor | int | float)]


def _same(first: Path, second: Path) -> bool:
    one, two = _tensors(first), _tensors(second)
    assert len(one) > 100
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages in one go."""
    run = tmp_path_factory.mktemp("whole")
    open_run(run, _recipe())
    assert train_vae(WF_VAE, run, _recipe(), _compute())
    assert train_dit(run, _recipe(), _compute(), True)
    return run


@pytest.fixture(scope="module")
def exported(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    assert main(["--run", str(whole_run), "--stage", "export", "--export", str(out)]) == 0
    return out


# --- training -------------------------------------------------------------------------------------------------------


def test_interrupted_training_ends_in_the_same_weights(whole_run: Path, tmp_path: Path) -> None:
    assert not train_vae(WF_VAE, tmp_path, _recipe(), _compute(stop_after=3))
    assert train_vae(WF_VAE, tmp_path, _recipe(), _compute())
    assert _same(whole_run / "vae.ckpt", tmp_path / "vae.ckpt")
    assert not train_dit(tmp_path, _recipe(), _compute(stop_after=2), True)
    assert train_dit(tmp_path, _recipe(), _compute(), True)
    assert _same(whole_run / "dit.ckpt", tmp_path / "dit.ckpt")


def test_forgotten_optimizer_state_is_noticed(whole_run: Path, tmp_path: Path) -> None:
    """The twin: without the moments (a slim checkpoint) the resumed weights must differ."""
    (tmp_path / "run").mkdir()
    assert not train_vae(WF_VAE, tmp_path / "run", _recipe(), _compute(stop_after=3))
    slim(tmp_path / "run", tmp_path / "slim")
    assert train_vae(WF_VAE, tmp_path / "slim", _recipe(), _compute())
    one, two = (torch.load(d / "vae.ckpt", weights_only=True)["ema"] for d in (whole_run, tmp_path / "slim"))
    assert not all(torch.equal(one[k], two[k]) for k in one)


def test_training_lowers_both_losses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae("tiny")
    video = torch.from_numpy(np.stack([render(scene_at(0, i), 5, 32, 32) for i in range(4)]))
    video = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    dit, text_encoder = build_transformer("tiny", 8), build_text_encoder("tiny", len(tokenizer))
    clean, alphas = torch.randn(16, 8, 1, 4, 4) * 0.3 + 1, make_scheduler().alphas_cumprod
    tokens = tokenize([prompt_rows(caption(scene_at(0, i)), guidance_scale=1)[0] for i in range(16)], tokenizer)

    def last_share(modules: list[torch.nn.Module], steps: int, loss_of: Any) -> float:
        optimizer = torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=3e-3)
        losses = []
        for step in range(steps):
            loss = loss_of(torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses[-5:]) / np.mean(losses[:3]))

    assert last_share([vae], 25, lambda g: vae_loss(WF_VAE, vae, video, g)[0]) < 0.75
    assert last_share([dit, text_encoder], 40, lambda g: dit_loss(dit, text_encoder, clean, tokens, alphas, g)) < 0.75


def test_a_vae_below_its_targets_is_not_trained_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no vae.ckpt: train with --stage vae first"):
        train_dit(tmp_path, _recipe(), _compute(), False)
    train_vae(WF_VAE, tmp_path, _recipe(), _compute(stop_after=1))
    with pytest.raises(ValueError, match=r"of the VAE: need 30.0 dB and 0.97; train it longer"):
        train_dit(tmp_path, _recipe(), _compute(), False)
    assert not (tmp_path / "vae.safetensors").exists()


def test_the_vae_begins_as_a_blurred_copy() -> None:
    """Otherwise training starts from noise: the lowest bands come back at once, nothing else is invented."""
    torch.manual_seed(0)
    vae = build_vae("tiny")
    with torch.no_grad():
        _, logvar = moments_of(vae, torch.rand(1, 3, 5, 32, 32) * 2 - 1)
        video = video_of(vae, torch.randn(1, 8, 2, 4, 4))
    assert bool((logvar == -6).all())
    assert video.shape == (1, 3, 5, 32, 32)
    assert video.abs().max() < 5
    blocks = video.unflatten(3, (16, 2)).unflatten(5, (16, 2))
    assert float(blocks.std((4, 6)).max()) < 1e-5  # nothing finer than the second level's bands


@torch.no_grad()
def test_whitened_latents_are_normal_and_come_back(whole_run: Path) -> None:
    vae = finish_vae(WF_VAE, whole_run, _recipe(), _compute(), accept=True)
    raw = load_file(whole_run / "latents.safetensors")["latents"].float()
    latents = vae.scale_latents(raw)
    assert latents.shape == (16, 8, 2, 4, 4)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.5
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.5
    assert (raw.std((0, 2, 3, 4)) - 1).abs().max() > 0.5  # the twin: they are not, before
    torch.testing.assert_close(vae.unscale_latents(latents), raw, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"std=0.0 of a latent channel must be positive"):
        with_whitening(vae, torch.zeros(8), torch.tensor([1.0] * 7 + [0.0]))


# --- what the DiT learns is what the sampler asks for ---------------------------------------------------------------


@pytest.mark.parametrize("wrong", [False, True])
def test_a_model_that_hits_the_target_samples_the_clip(wrong: bool) -> None:
    """v as `dit_loss` defines it, of one known clip, through the sampler; with the other sign the clip is missed."""
    clean = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    alphas = make_scheduler().alphas_cumprod
    scheduler, generator = start_scheduler(12), torch.Generator().manual_seed(2)
    latents = initial_latents(SPEC, scheduler, generator, 16)
    for t in scheduler.timesteps:
        a = alphas[int(t)].double()
        x = scheduler.scale_model_input(latents, t).double()
        noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
        v = a.sqrt() * noise - (1 - a).sqrt() * clean
        latents = denoise_step(scheduler, latents, (-v if wrong else v).float(), t, generator)
    assert ((latents - clean).abs().max() < 1e-2) != wrong


def test_half_of_the_timesteps_have_the_first_models_noise() -> None:
    alphas = make_scheduler().alphas_cumprod
    t = timesteps(20000, alphas, torch.Generator().manual_seed(0))
    assert (t.dtype, int(t.min()), int(t.max())) == (torch.int64, 0, 999)
    level = noise_levels(20000, torch.Generator().manual_seed(1))
    a = alphas[t]
    ours = 1 / (1 + (a / (1 - a)).sqrt())  # the s whose (1 - s) / s has this ratio
    share = float((ours < 2 / 3).float().mean())
    uniform = float((1 / (1 + (alphas / (1 - alphas)).sqrt()) < 2 / 3).float().mean())
    wanted = float((level < 2 / 3).float().mean())
    assert abs(share - (uniform + wanted) / 2) < 0.02
    assert abs(uniform - wanted) > 0.1  # the twin: a uniform draw alone is something else


@pytest.mark.parametrize("kind", ["dense", "single", "group"])
def test_plain_attention_equals_the_models_own(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 80, 3, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    sparse = SkipSparse(kind=kind, k=1 if kind == "dense" else 4)
    ours = plain_attention(q, k, v, sparse=sparse, key_bias=None)
    torch.testing.assert_close(ours, skip_sparse_attention(q, k, v, sparse=sparse, key_bias=None), atol=1e-10, rtol=0)
    other = SkipSparse(kind="single" if kind != "single" else "group", k=4)  # the twin: other groups
    assert (plain_attention(q, k, v, sparse=other, key_bias=None) - ours).abs().max() > 0.1


@pytest.mark.parametrize("compile_blocks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_preparing_for_a_cpu_changes_no_gradient(tokenizer: Any, compile_blocks: bool) -> None:
    """Other attention, and text padded further, at a size that fills whole groups: the same loss and gradients."""
    recipe = _recipe(height=64, width=64, num_frames=17)
    clean, alphas = torch.randn(2, 8, 5, 8, 8), make_scheduler().alphas_cumprod
    texts = [prompt_rows(caption(scene_at(0, i)), guidance_scale=1)[0] for i in range(2)]
    found = []
    for prepared in (False, True):
        torch.manual_seed(0)
        dit, text_encoder = build_transformer("tiny", 8), build_text_encoder("tiny", len(tokenizer))
        for parameter in dit.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        if prepared:
            prepare_for_cpu(dit, recipe, compile_blocks=compile_blocks)
            processors = [block.attn1.processor for block in dit.blocks()]
            assert all(getattr(p, "attend", None) is plain_attention for p in processors)
        tokens = tokenize(texts, tokenizer, same_length=prepared)
        loss = dit_loss(dit, text_encoder, clean, tokens, alphas, torch.Generator().manual_seed(1))
        torch.autograd.backward(loss)
        gradients = [p.grad for m in (dit, text_encoder) for p in m.parameters()]
        found.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()
    assert found[0].abs().max() > 1e-3


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    assert [path.name for path in folder.iterdir()] == ["spiece.model"]
    return load_tokenizer(folder)


def test_a_fresh_text_encoder_knows_the_order_of_words(tokenizer: Any) -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder("base", len(tokenizer)).eval()
    texts = [
        "a red square on the left and a blue bar on the right",
        "a blue square on the left and a red bar on the right",
    ]

    def difference() -> float:
        """Between the averages over the words, which a bag of words gives the same for both."""
        tokens = tokenize(texts, tokenizer)
        assert tokens["mask"].all()
        with torch.no_grad():
            one, other = encoder(input_ids=tokens["ids"], attention_mask=tokens["mask"]).last_hidden_state.mean(1)
        return float((one - other).norm() / one.norm())

    assert difference() > 0.02
    torch.nn.init.zeros_(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    assert difference() < 1e-5


def test_every_word_of_the_grammar_is_one_token(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    for i in range(300):
        text = caption(scene_at(8, i, split="any"), rng)
        pieces = [piece for piece in tokenizer.tokenize(text) if piece != ","]
        assert pieces == [f"▁{word.strip(',')}" for word in text.split()]
        assert len(tokenizer(prompt_rows(text)[1])["input_ids"]) <= TEXT_TOKENS
    assert len(tokenizer(NEGATIVE_PROMPT)["input_ids"]) <= TEXT_TOKENS
    assert tokenizer.unk_token_id not in tokenizer(NEGATIVE_PROMPT + string.printable[:95])["input_ids"]
    assert tokenizer.tokenize("a fox") == ["▁a", "▁", "f", "o", "x"]  # other words are spelt
    assert tokenizer.unk_token_id in tokenizer("雪")["input_ids"]


@torch.no_grad()
def test_training_text_equals_the_pipelines_text(tokenizer: Any) -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder("tiny", len(tokenizer))
    rows = prompt_rows("a red ball bounces")
    tokens = tokenize(rows, tokenizer)
    ours = encoder(input_ids=tokens["ids"], attention_mask=tokens["mask"]).last_hidden_state
    wanted = encode_prompt(tokenizer, encoder, rows, 160)  # the pipeline's own padding
    for row in range(2):
        length = int(tokens["mask"][row].sum())
        assert length == int(wanted.mask[row].sum()) <= TEXT_TOKENS
        torch.testing.assert_close(ours[row, :length], wanted.embeds[row, 0, :length], atol=1e-6, rtol=1e-5)


def test_guidance_has_both_kinds_of_nothing_to_learn_from(tokenizer: Any) -> None:
    batches = DitBatches(_recipe(batch_scale=10.0), _prompt_or_nothing, partial(tokenize, tokenizer=tokenizer))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for i in range(4) for ids in batches(i)["ids"]]
    negative = tokenizer.decode(tokenizer(NEGATIVE_PROMPT)["input_ids"], skip_special_tokens=True)
    for what in ("", negative):
        assert 0.03 < sum(text == what for text in texts) / len(texts) < 0.07
    assert sum(text.strip().startswith("high quality") for text in texts) > 0.85 * len(texts)


# --- sizes and export -----------------------------------------------------------------------------------------------


def test_shipped_sizes_fit_the_limit_and_have_every_kind_of_attention(tokenizer: Any) -> None:
    shape = DIT_SHAPES["base"]
    with torch.device("meta"):
        dit = build_transformer("base", VAE_SHAPES["small"].latent_channels)
        encoder = build_text_encoder("base", len(tokenizer))
    assert 2 * num_parameters(build_vae("small"), dit, encoder) < MAX_BYTES - 100_000
    assert shape.heads in (6, 12, 24)
    assert {block.sparse.kind for block in dit.blocks()} == {"dense", "single", "group"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae": "wide"}, r"vae='wide' must be one of tiny, small, nearest is 'small'"),
        ({"num_frames": 16}, r"num_frames=16 must be 1 \+ 4\*k and at least 5, nearest is 17"),
    ],
)
def test_recipes_that_cannot_train_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _recipe(**change).check(VAE_SHAPES, DIT_SHAPES)


def test_the_exported_directory_holds_what_was_trained(whole_run: Path, exported: Path) -> None:
    parts = load_parts(exported)
    weights = load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert sum(f.stat().st_size for f in exported.rglob("*")) <= MAX_BYTES
    assert "5 VAE and 6 DiT iterations, seed 3" in (exported / "README.md").read_text()
    ema = torch.load(whole_run / "dit.ckpt", weights_only=True)["ema"]
    for name, module in (("dit", parts.transformer), ("text_encoder", parts.text_encoder)):
        for key, value in module.state_dict().items():
            assert torch.equal(value, ema[f"{name}.{key}"].bfloat16().float()), key
    kept = load_file(whole_run / "vae.safetensors")
    torch.testing.assert_close(torch.tensor(parts.vae.config.shift), kept["whitening.mean"])
    torch.testing.assert_close(torch.tensor(parts.vae.config.scale), 1 / kept["whitening.std"])


def test_training_goes_on_from_an_exported_directory(whole_run: Path, exported: Path, tmp_path: Path) -> None:
    """What is shipped is enough to go on: the weights as they were rounded, the whitening, how far they had come."""
    recipe, run = _recipe(dit_iterations=7), tmp_path / "run"
    start_from(PROGRAM, exported, run, recipe)
    before = torch.load(whole_run / "dit.ckpt", weights_only=True)["ema"]
    taken = torch.load(run / "dit.ckpt", weights_only=True)
    assert taken["iteration"] == 6
    assert taken["ema"].keys() == before.keys()
    assert all(torch.equal(value, before[key].bfloat16().float()) for key, value in taken["ema"].items())
    one, two = (load_file(folder / "vae.safetensors") for folder in (whole_run, run))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value if "whitening" in key else value.bfloat16().float())
    assert train_dit(run, recipe, _compute(), False)
    assert torch.load(run / "dit.ckpt", weights_only=True)["iteration"] == 7


def test_a_decoder_goes_on_without_moving_the_latents(whole_run: Path, tmp_path: Path) -> None:
    slim(whole_run, tmp_path)
    assert train_decoder(WF_VAE, tmp_path, _recipe(), _compute(), 2)
    one, two = (load_file(folder / "vae.safetensors") for folder in (whole_run, tmp_path))
    assert one.keys() == two.keys()
    assert {key.split(".")[0] for key in one if not torch.equal(one[key], two[key])} == {"decoder"}


def test_a_directory_of_this_layout_renders_on_ranks_as_in_one_process(tmp_path: Path, launcher: LocalLauncher) -> None:
    folder = tiny_open_sora_plan(tmp_path / "model")
    prompt = "a large red triangle moves left on a black background"
    call: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 64}
    ours = render_frames(load_parts(folder), prompt, spec=SPEC, seed=5, **call)
    size = {"height": SPEC.height, "width": SPEC.width, "num_frames": SPEC.num_frames}
    with OpenSoraPlanPipeline.from_pretrained(folder, launcher=launcher) as pipe:
        clips = [
            np.stack(pipe(text, seed=seed, **size, **call).frames[0])
            for text, seed in itertools.product((prompt, "a small blue bar rests"), (5, 6))
        ]
    assert np.array_equal(clips[0], ours.numpy())
    assert all(not np.array_equal(clips[0], clip) for clip in clips[1:])  # the twin: another prompt, another seed


def test_exporting_again_replaces_it_and_touches_nothing_else(whole_run: Path, exported: Path, tmp_path: Path) -> None:
    assert main(["--run", str(whole_run), "--stage", "export", "--export", str(exported)]) == 0
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match=r"exists and holds no model_index\.json"):
        main(["--run", str(whole_run), "--stage", "export", "--export", str(tmp_path / "precious")])
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(ValueError, match=r"holds no vae.safetensors: train with --stage dit first"):
        export(tmp_path, tmp_path / "out", _recipe(), _compute(), torch.bfloat16)


def test_command_line_resumes_only_when_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sizes = ["--vae", "tiny", "--dit", "tiny", "--frames", "5", "--height", "32", "--width", "32", "--seed", "3"]
    amounts = ["--vae-iterations", "2", "--batch-scale", "0.06", "--eval-prompts", "2", "--threads", "1"]
    arguments = ["--run", str(run), "--stage", "vae", *sizes, *amounts]
    assert main(arguments) == 0
    with pytest.raises(ValueError, match="already holds a run: pass --resume"):
        main(arguments)
    with pytest.raises(ValueError, match=r"seed=9 differs from 3 of this run"):
        main([*arguments, "--resume", "--seed", "9"])
    assert main([*arguments, "--resume", "--vae-iterations", "3"]) == 0
    assert torch.load(run / "vae.ckpt", weights_only=True)["iteration"] == 3
    with pytest.raises(ValueError, match="anneal=True needs --minutes"):
        main([*arguments, "--resume", "--anneal"])
    with pytest.raises(ValueError, match="stage='export' needs --export DIRECTORY"):
        main(["--run", str(run), "--stage", "export"])
