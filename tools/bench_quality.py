"""Measure what a text-to-video pipeline draws: does it follow held-out prompts, and how far is it from the exact run?

    python -m tools.bench_quality MODEL --prompts 200 --case exact:steps=50 --case fast:steps=8 --json quality.json

MODEL is a pipeline directory of HunyuanVideo or Open-Sora-Plan, or a bundled one such as `bundled:moving_shapes`.
Each `--case NAME:key=value,...` renders the same prompts with the same noise. The first case is the reference: the
others are compared with it clip by clip (PSNR, SSIM) and prompt by prompt (exact McNemar test of "all attributes
right"). Two cases need no model run: `renderer=truth` shows what the detector can reach and `renderer=vae` what the
VAE lets through. Keys: renderer, steps, guidance, true_cfg, dtype, damage; see `Case`. A key with a dot is one of
videopipe's own configuration, and has the case rendered by videopipe:

    --case rows:steps=50,groups.dit_ranks=7,groups.vae_ranks=1,attention.balance=rows
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from numpy.typing import NDArray

from pipelines import HunyuanVideoPipeline as OwnHunyuanVideoPipeline
from pipelines import OpenSoraPlanPipeline
from pipelines.bundled import find_weights
from pipelines.checkpoint import Checkpoint
from pipelines.families import load_family
from pipelines.launch import LocalLauncher
from pipelines.models.open_sora_plan_layout import find_folders
from pipelines.models.open_sora_plan_loading import load_vae
from pipelines.open_sora_plan import DEFAULT_GUIDANCE_SCALE, load_parts, render_frames
from tools.moving_shapes import ATTRIBUTES, Detector, Scene, Split, caption, render, said_and_read, scene_at, score
from videopipe.config import Config, load_config
from videopipe.files import write_bytes
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest

Frames = NDArray[np.uint8]
FamilyName = Literal["hunyuan-video", "open-sora-plan"]
RendererName = Literal["reference", "videopipe", "vae", "truth"]
DtypeName = Literal["float32", "bfloat16", "float16"]

MAX_PSNR_DB = 100.0  # what equal clips count as
_FAMILIES: dict[str, FamilyName] = {"HunyuanVideoPipeline": "hunyuan-video", "OpenSoraPlanPipeline": "open-sora-plan"}
_GUIDANCE: dict[FamilyName, float] = {"hunyuan-video": 6.0, "open-sora-plan": DEFAULT_GUIDANCE_SCALE}
_TEXT_TOKENS = {"hunyuan-video": 256, "open-sora-plan": 512}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPrompt:
    """One clip to render: the sentence, the seed of its noise, and the scene that the sentence says."""

    id: str
    prompt: str
    seed: int
    scene: Scene


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way to render.

    `renderer` "reference" is the model in one process: diffusers' own pipeline, or for Open-Sora-Plan the functions of
    `pipelines.open_sora_plan`. `guidance` is HunyuanVideo's embedded scale and Open-Sora-Plan's classifier-free one
    (None: the family's default), `true_cfg` above 1 adds HunyuanVideo's unconditional branch (negative prompt ""),
    `damage` adds Gaussian noise to every DiT weight, as a multiple of that tensor's standard deviation. `overrides`
    are `path=value` strings for videopipe's configuration.
    """

    name: str
    renderer: RendererName = "reference"
    steps: int = 50
    guidance: float | None = None
    true_cfg: float = 1.0
    dtype: DtypeName = "float32"
    damage: float = 0.0
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSize:
    """What every clip of a bench run measures, in frames and pixels."""

    num_frames: int
    height: int
    width: int


# Takes all prompts and yields one clip uint8 [T, H, W, 3] for each, in order. Any pipeline plugs in here.
Renderer = Callable[[Sequence[BenchPrompt]], Iterable[Frames]]


def parse_case(text: str) -> Case:
    """`fast:steps=8,true_cfg=3` as a Case.

    Raises:
        ValueError: an unknown key, or a value that the key cannot take.
    """
    name, _, rest = text.partition(":")
    kinds: dict[str, Callable[[str], Any]] = {
        "renderer": str,
        "steps": int,
        "guidance": float,
        "true_cfg": float,
        "dtype": str,
        "damage": float,
    }
    values: dict[str, Any] = {}
    overrides = []
    for item in filter(None, rest.split(",")):
        key, sign, value = item.partition("=")
        if "." in key and sign:
            overrides.append(item)
            continue
        if key not in kinds or not sign:
            raise ValueError(f"case {name!r}: {item!r} is not key=value with a key of {', '.join(kinds)}")
        try:
            values[key] = kinds[key](value)
        except ValueError as error:
            raise ValueError(f"case {name!r}: {key}={value!r} is no {kinds[key].__name__}") from error
    if overrides:
        values = {"renderer": "videopipe", "overrides": tuple(overrides)} | values
    case = Case(name=name, **values)
    for key, allowed in (("renderer", get_args(RendererName)), ("dtype", get_args(DtypeName))):
        if getattr(case, key) not in allowed:
            raise ValueError(f"case {name!r}: {key}={getattr(case, key)!r} must be one of {', '.join(allowed)}")
    if not name:
        raise ValueError(f"case {text!r} has no name: write NAME:key=value,...")
    if case.steps < 1:
        raise ValueError(f"case {name!r}: steps={case.steps} must be at least 1, nearest is 1")
    if case.damage < 0:
        raise ValueError(f"case {name!r}: damage={case.damage} must not be negative, nearest is 0")
    if case.renderer != "videopipe" and case.overrides:
        raise ValueError(f"case {name!r}: {case.overrides[0]!r} means nothing to {case.renderer}, nearest is videopipe")
    if case.renderer == "videopipe" and case.damage:
        raise ValueError(f"case {name!r}: damage={case.damage} needs renderer=reference, nearest is 0")
    return case


def family_of(model: Path) -> FamilyName:
    """The family of a pipeline directory, by its model_index.json.

    Raises:
        ValueError: no such file, or another family.
    """
    file = model / "model_index.json"
    if not file.is_file():
        raise ValueError(f"model={str(model)!r} is no pipeline directory: it holds no model_index.json")
    name = json.loads(file.read_text()).get("_class_name")
    if name not in _FAMILIES:
        raise ValueError(f"model={str(model)!r} is a {name}, must be one of {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def check_cases(model: Path, cases: Sequence[Case], size: ClipSize) -> None:
    """Refuse what could not be rendered, before hours are spent on the cases before it.

    Raises:
        ValueError: names the case, the field, the value and the nearest valid value.
    """
    family = load_family(family_of(model))
    facts = family.facts(Checkpoint(str(model)))
    prompt = BenchPrompt(id="check", prompt="", seed=0, scene=scene_at(0, 0))
    for case in cases:
        if case.renderer in ("reference", "videopipe"):
            family.check_request(_request(prompt, case, size, family_of(model)), facts, f"case {case.name!r}: ")
        if case.renderer == "videopipe":
            try:
                family.check_config(_config(model, case))
            except ValueError as error:
                raise ValueError(f"case {case.name!r}: {error}") from None


def bench_prompts(count: int, *, seed: int, split: Split, num_objects: int | None) -> list[BenchPrompt]:
    """The first `count` prompts of the list that `seed` names, in varied wording."""
    prompts = []
    for index in range(count):
        scene = scene_at(seed + 7_000_003, index, split=split, num_objects=num_objects)
        text = caption(scene, np.random.default_rng([seed, 7, index]))
        prompts.append(BenchPrompt(id=f"{index:05d}", prompt=text, seed=index, scene=scene))
    return prompts


# --- renderers ------------------------------------------------------------------------------------------------------


def diffusers_renderer(model: Path, case: Case, size: ClipSize, device: torch.device, batch: int) -> Renderer:
    """The model directory through diffusers' own pipeline, `batch` prompts at a time."""
    pipe = HunyuanVideoPipeline.from_pretrained(model, dtype=getattr(torch, case.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if case.damage:
        damage_weights(pipe.transformer, case.damage)

    def renderer(prompts: Sequence[BenchPrompt]) -> Iterable[Frames]:
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            video = pipe(
                prompt=[p.prompt for p in part],
                negative_prompt=[""] * len(part) if case.true_cfg > 1 else None,
                height=size.height,
                width=size.width,
                num_frames=size.num_frames,
                num_inference_steps=case.steps,
                guidance_scale=_guidance(case, "hunyuan-video"),
                true_cfg_scale=case.true_cfg,
                generator=[torch.Generator().manual_seed(p.seed) for p in part],
                output_type="np",
            ).frames
            yield from np.rint(np.asarray(video) * 255).astype(np.uint8)

    return renderer


def one_process_renderer(model: Path, case: Case, size: ClipSize, device: torch.device) -> Renderer:
    """An Open-Sora-Plan directory in this process, one prompt at a time."""
    parts = load_parts(model, dtype=getattr(torch, case.dtype), device=device)
    if case.damage:
        damage_weights(parts.transformer, case.damage)

    def renderer(prompts: Sequence[BenchPrompt]) -> Iterable[Frames]:
        for p in prompts:
            frames = render_frames(
                parts,
                p.prompt,
                spec=_spec(size),
                num_inference_steps=case.steps,
                guidance_scale=_guidance(case, "open-sora-plan"),
                seed=p.seed,
                max_sequence_length=_TEXT_TOKENS["open-sora-plan"],
            )
            yield frames.numpy()

    return renderer


class _Result(Protocol):
    """The part of a finished clip that the bench reads: frames uint8 [T, H, W, 3] and whose they are."""

    @property
    def request_id(self) -> str: ...

    @property
    def frames(self) -> Frames: ...


def videopipe_renderer(
    render_all: Callable[[list[VideoRequest]], Iterable[_Result]],
    case: Case,
    size: ClipSize,
    family: FamilyName = "hunyuan-video",
) -> Renderer:
    """Any videopipe configuration, given the `render` method of its open pipeline; clips may finish in any order.

    The requests carry the same prompts and seeds as the reference, so the two start from the same noise.
    """

    def renderer(prompts: Sequence[BenchPrompt]) -> Iterable[Frames]:
        requests = [_request(p, case, size, family) for p in prompts]
        clips = {result.request_id: result.frames for result in render_all(requests)}
        missing = [p.id for p in prompts if p.id not in clips]
        if missing:
            raise ValueError(
                f"no frames came for {len(missing)} of {len(prompts)} requests, the first is {missing[0]!r}"
            )
        return [clips[p.id] for p in prompts]

    return renderer


def local_renderer(model: Path, case: Case, size: ClipSize, launcher: LocalLauncher | None = None) -> Renderer:
    """The model directory through videopipe on ranks of this machine, as the case's overrides configure them."""
    family = family_of(model)
    pipeline = {"hunyuan-video": OwnHunyuanVideoPipeline, "open-sora-plan": OpenSoraPlanPipeline}[family]

    def renderer(prompts: Sequence[BenchPrompt]) -> Iterable[Frames]:
        with pipeline.from_pretrained(config=_config(model, case), launcher=launcher) as pipe:
            yield from videopipe_renderer(pipe.render, case, size, family)(prompts)

    return renderer


def _config(model: Path, case: Case) -> Config:
    given = {"family": family_of(model), "weights": str(model), "dtype": case.dtype}
    return load_config({"model": given}, case.overrides)


def _request(prompt: BenchPrompt, case: Case, size: ClipSize, family: FamilyName) -> VideoRequest:
    return VideoRequest(
        id=prompt.id,
        prompt=prompt.prompt,
        negative_prompt="" if case.true_cfg > 1 else None,
        spec=_spec(size),
        num_inference_steps=case.steps,
        guidance_scale=_guidance(case, family),
        true_cfg_scale=case.true_cfg,
        seed=prompt.seed,
        max_sequence_length=_TEXT_TOKENS[family],
    )


def _guidance(case: Case, family: FamilyName) -> float:
    return _GUIDANCE[family] if case.guidance is None else case.guidance


def _spec(size: ClipSize) -> VideoSpec:
    return VideoSpec(height=size.height, width=size.width, num_frames=size.num_frames)


def vae_renderer(model: Path, case: Case, size: ClipSize, device: torch.device) -> Renderer:
    """The real clip of each scene through the model's VAE: the best that any denoiser could reach."""
    dtype = getattr(torch, case.dtype)
    vae: Any
    if family_of(model) == "open-sora-plan":
        vae = load_vae(find_folders(model).vae, dtype, device)
    else:
        vae = AutoencoderKLHunyuanVideo.from_pretrained(model, subfolder="vae", dtype=dtype).to(device)

    @torch.no_grad()
    def renderer(prompts: Sequence[BenchPrompt]) -> Iterable[Frames]:
        for p in prompts:
            frames = render(p.scene, size.num_frames, size.height, size.width)
            video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(device).to(vae.dtype) / 127.5 - 1
            back = vae.decode(vae.encode(video).latent_dist.mode()).sample.float().clamp(-1, 1)
            yield ((back[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()

    return renderer


def truth_renderer(size: ClipSize) -> Renderer:
    """The real clip of each scene: what the detector itself can reach."""
    return lambda prompts: (render(p.scene, size.num_frames, size.height, size.width) for p in prompts)


@torch.no_grad()
def damage_weights(module: torch.nn.Module, amount: float) -> None:
    """Add noise of `amount` standard deviations of each weight matrix to it, in place; always the same noise."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(amount * parameter.std() * noise)


def make_renderer(
    model: Path, case: Case, size: ClipSize, device: torch.device, batch: int, launcher: LocalLauncher | None = None
) -> Renderer:
    """The renderer that the case names."""
    if case.renderer == "truth":
        return truth_renderer(size)
    if case.renderer == "videopipe":
        return local_renderer(model, case, size, launcher)
    if case.renderer == "vae":
        return vae_renderer(model, case, size, device)
    if family_of(model) == "open-sora-plan":
        return one_process_renderer(model, case, size, device)
    return diffusers_renderer(model, case, size, device, batch)


# --- statistics -----------------------------------------------------------------------------------------------------


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (95 % at z = 1.96); (0, 1) where nothing was counted.

    Source: E. B. Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p-value that two paired lists of successes have the same rate.

    Source: Q. McNemar 1947; exact (binomial) form.
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    tail: float = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def psnr_db(first: Frames, second: Frames) -> float:
    """PSNR of two clips in dB over all frames, MAX_PSNR_DB where they are equal."""
    mse = float(np.square(first.astype(np.float64) - second.astype(np.float64)).mean()) / 255**2
    return min(MAX_PSNR_DB, -10 * math.log10(mse)) if mse > 0 else MAX_PSNR_DB


def ssim(first: Frames, second: Frames) -> float:
    """Mean SSIM of two clips [T, H, W, 3], frame by frame and channel by channel, Gaussian window of sigma 1.5.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    x, y = (f.astype(np.float64) / 255 for f in (first, second))
    mx, my = _window(x), _window(y)
    vx, vy = _window(x * x) - mx * mx, _window(y * y) - my * my
    cov = _window(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    values = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(values.mean())


def _window(video: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean of sigma 1.5 over 11 rows and 11 columns, without borders: [T, H, W, C] -> [T, H-10, W-10, C]."""
    weights = np.exp(-0.5 * np.square((np.arange(11) - 5) / 1.5))
    weights /= weights.sum()
    height, width = video.shape[1] - 10, video.shape[2] - 10
    rows = np.sum([w * video[:, i : i + height] for i, w in enumerate(weights)], axis=0)
    return np.asarray(np.sum([w * rows[:, :, i : i + width] for i, w in enumerate(weights)], axis=0), np.float64)


def _mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean and the half width of its 95 % interval (normal)."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 4), "half_width": round(1.96 * spread, 4)}


def measure(prompts: Sequence[BenchPrompt], renderer: Renderer, reference: Sequence[Frames] | None) -> dict[str, Any]:
    """Render every prompt and measure it.

    Args:
        reference: the exact run's clips in the same order, or None.
    Returns:
        "frames" (the clips), "right" (per prompt, all attributes of all objects), "accuracy" by attribute with
        right, total, share, low and high (per object; an abstention is wrong, and counted under "abstained"),
        "misread" (per attribute, how often "said -> read" for every wrong reading; None is an abstention),
        "seconds_per_clip", and with a reference "psnr_db" and "ssim" (mean and half width of its 95 % interval),
        "identical" (clips) and "largest_difference" (of a value in any of them, of 255).
    Raises:
        ValueError: the renderer gave another number of clips than prompts.
    """
    detector = Detector()
    begun = time.monotonic()
    clips = list(renderer(prompts))
    seconds = time.monotonic() - begun
    if len(clips) != len(prompts):
        raise ValueError(f"the renderer gave {len(clips)} clips for {len(prompts)} prompts")
    right = dict.fromkeys((*ATTRIBUTES, "all"), 0)
    misread: dict[str, Counter[tuple[str, str | None]]] = {name: Counter() for name in ATTRIBUTES}
    total, every = 0, []
    for prompt, frames in zip(prompts, clips, strict=True):
        reading = detector(frames)
        scores = score(prompt.scene, reading)
        total += len(scores)
        every.append(all(s["all"] for s in scores))
        for one in scores:
            for name, value in one.items():
                right[name] += value
        for pairs_of in said_and_read(prompt.scene, reading):
            for name, (said, read) in pairs_of.items():
                if said != read:
                    misread[name][said, read] += 1
    accuracy = {}
    for name, count in right.items():
        low, high = wilson(count, total)
        accuracy[name] = {
            "right": count,
            "total": total,
            "share": round(count / total, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    result: dict[str, Any] = {
        "frames": clips,
        "right": every,
        "accuracy": accuracy,
        "abstained": {
            name: sum(n for (_, read), n in counts.items() if read is None) for name, counts in misread.items()
        },
        "misread": {
            name: {f"{said} -> {read}": n for (said, read), n in counts.most_common()}
            for name, counts in misread.items()
        },
        "seconds_per_clip": round(seconds / len(prompts), 4),
    }
    if reference is not None:
        pairs = list(zip(reference, clips, strict=True))
        result["psnr_db"] = _mean_and_error([psnr_db(a, b) for a, b in pairs])
        result["ssim"] = _mean_and_error([ssim(a, b) for a, b in pairs])
        differences = [int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) for a, b in pairs]
        result["identical"] = differences.count(0)
        result["largest_difference"] = max(differences)
    return result


def run_bench(
    prompts: Sequence[BenchPrompt],
    cases: Sequence[Case],
    renderer_of: Callable[[Case], Renderer],
    on_results: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Measure every case against the first one.

    Args:
        renderer_of: gives the renderer of a case; called when the case's turn comes, so one model is held at a time.
        on_results: is given all results so far after each case, so that a run that is stopped has not been in vain.
    Returns:
        One dictionary per case, ready for JSON: what `measure` gives without the clips, the case itself, and
        "p_same_as_reference", the exact McNemar p-value.
    Raises:
        ValueError: no prompts, no cases, or two cases of one name.
    """
    if not prompts or not cases:
        raise ValueError(f"{len(prompts)} prompts and {len(cases)} cases: need at least 1 of each")
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"cases {', '.join(names)} must have different names")
    results: list[dict[str, Any]] = []
    reference: list[Frames] | None = None
    first: list[bool] = []
    for case in cases:
        result = measure(prompts, renderer_of(case), reference)
        clips, right = result.pop("frames"), result.pop("right")
        if reference is None:
            reference, first = clips, right
        else:
            result["p_same_as_reference"] = float(f"{mcnemar(first, right):.3g}")
        results.append({"case": asdict(case), **result})
        on_results(results)
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table.

    Share in percent with its 95 % interval; distance from the first case, the clips that are the same to the bit, and
    the probability that "everything right" happens as often.
    """
    head = ["case", *ATTRIBUTES, "all", "PSNR dB", "SSIM", "same", "p", "s/clip"]
    rows = [head, ["---"] * len(head)]
    for r in results:
        row = [r["case"]["name"]]
        for name in (*ATTRIBUTES, "all"):
            a = r["accuracy"][name]
            row.append(f"{100 * a['share']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]")
        if "psnr_db" in r:
            row += [f"{r[key]['mean']:.{n}f} ±{r[key]['half_width']:.{n}f}" for key, n in (("psnr_db", 2), ("ssim", 4))]
            row += [str(r["identical"]), f"{r['p_same_as_reference']:.2g}"]
        else:
            row += ["reference", "", "", ""]
        rows.append([*row, f"{r['seconds_per_clip']:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main(argv: Sequence[str] | None = None, launcher: LocalLauncher | None = None) -> int:
    """Render, measure, print the table and write the JSON; `launcher` starts the ranks, where somebody has one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="pipeline directory, or bundled:NAME")
    parser.add_argument("--case", action="append", type=parse_case, dest="cases", help="NAME:key=value,... (repeat)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--split", choices=("held_out", "train", "any"), default="held_out")
    parser.add_argument("--objects", type=int, choices=(1, 2), help="only scenes with so many objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    model = Path(find_weights(args.model))
    cases = args.cases or [Case(name="exact")]
    size = ClipSize(num_frames=args.frames, height=args.height, width=args.width)
    check_cases(model, cases, size)
    device = torch.device(args.device)
    prompts = bench_prompts(args.prompts, seed=args.seed, split=args.split, num_objects=args.objects)

    def keep(results: list[dict[str, Any]]) -> None:
        sys.stderr.write(f"{len(results)} of {len(cases)} cases: {results[-1]['case']['name']} is done\n")
        if args.json is None:
            return
        report = {
            "model": args.model,
            "prompts": {"count": len(prompts), "split": args.split, "seed": args.seed, "objects": args.objects},
            "size": asdict(size),
            "device": args.device,
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "numpy": np.__version__},
            "fields": {"case": [f.name for f in fields(Case)], "share": "of objects, abstentions are wrong"},
            "results": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(args.json, (json.dumps(report, indent=1) + "\n").encode())

    def renderer_of(case: Case) -> Renderer:
        return make_renderer(model, case, size, device, args.batch, launcher)

    results = run_bench(prompts, cases, renderer_of, keep)
    sys.stdout.write(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
