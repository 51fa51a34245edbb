"""The command line of a demo model's training program, one for all families, and going on from what was exported."""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.demo_model import TRAINING, DitSize, VaeSize
from tools.demo_training import (
    Compute,
    Recipe,
    keep_freed_memory,
    open_run,
    save_atomic,
    save_tensors,
    state_of,
    write_json,
)
from tools.demo_training_stages import VaeKind, evaluate_vae, train_decoder, train_vae


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What differs between the families' training programs."""

    description: str
    vae: VaeKind
    vae_shapes: Mapping[VaeSize, Any]
    dit_shapes: Mapping[DitSize, Any]
    train_dit: Callable[[Path, Recipe, Compute, bool], bool]
    """(run, recipe, compute, accept_vae) to whether the total is reached."""
    export: Callable[[Path, Path, Recipe, Compute, torch.dtype], int]
    """(run, directory to write, recipe, compute, dtype) to its bytes."""
    averages_of: Callable[[Path], dict[str, Tensor]]
    """Exported directory to what its run held as averages of the second stage."""
    vae_of: Callable[[Path], dict[str, Tensor]]
    """Exported directory to what its run kept of the finished VAE."""
    tokenizers: tuple[str, ...]
    vae_iterations: int
    dit_iterations: int


def start_from(program: Program, exported: Path, run: Path, recipe: Recipe) -> None:
    """Begin a run with the weights of an exported pipeline: its VAE is finished, its DiT goes on with fresh moments.

    Raises:
        ValueError: not an exported pipeline, `run` holds a run already, or the recipe has another seed or other sizes.
    """
    if not (exported / TRAINING).is_file():
        raise ValueError(f"start_from={str(exported)!r} holds no {TRAINING}: name a directory that --export wrote")
    if (run / "recipe.json").exists():
        raise ValueError(f"run={str(run)!r} already holds a run: leave out --start-from to go on with it")
    training = json.loads((exported / TRAINING).read_text())
    run.mkdir(parents=True, exist_ok=True)
    write_json(training["recipe"], run / "recipe.json")
    open_run(run, recipe)
    for name in program.tokenizers:
        shutil.copytree(exported / name, run / name, dirs_exist_ok=True)
    save_atomic({"ema": program.averages_of(exported), **training["dit"]}, run / "dit.ckpt")
    write_json(training["vae"], run / "vae.json")
    save_tensors(program.vae_of(exported), run / "vae.safetensors")


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Every weight in the safetensors files of a folder, as fp32."""
    return {
        key: value.float() for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()
    }


def trained(run: Path, recipe: Recipe, compute: Compute) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Averages of the second stage, and what an exported directory says of its training: enough to go on from.

    Raises:
        ValueError: the run has no finished VAE or no DiT checkpoint yet.
    """
    for name in ("vae.safetensors", "dit.ckpt"):
        if not (run / name).exists():
            raise ValueError(f"run={str(run)!r} holds no {name}: train with --stage dit first")
    state = torch.load(run / "dit.ckpt", map_location=compute.device, weights_only=True)
    return state["ema"], {
        "recipe": asdict(recipe),
        "vae": json.loads((run / "vae.json").read_text()),
        "dit": {"iteration": state["iteration"], "seconds": round(state["seconds"], 1)},
    }


def slim(run: Path, out: Path) -> None:
    """Copy a run without optimizer state and cached latents: about an eighth of the bytes, enough to go on from.

    Training resumed from the copy starts at the averaged weights with a fresh optimizer.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stage in ("vae", "dit"):
        if (run / f"{stage}.ckpt").exists():
            state = torch.load(run / f"{stage}.ckpt", map_location="cpu", weights_only=True)
            save_atomic({key: state[key] for key in ("ema", "iteration", "seconds")}, out / f"{stage}.ckpt")
    for name in ("recipe.json", "curves.jsonl", "vae.safetensors", "vae.json"):
        if (run / name).exists():
            shutil.copyfile(run / name, out / name)
    for name in ("tokenizer", "tokenizer_2"):
        if (run / name).exists():
            shutil.copytree(run / name, out / name, dirs_exist_ok=True)


_STAGES = ("vae", "dit", "all", "decoder", "evaluate-vae", "export", "slim")
_TRAINS = ("vae", "dit", "all", "decoder")


def _parser(program: Program) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=program.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="directory of checkpoints and curves")
    parser.add_argument("--resume", action="store_true", help="continue the run that the directory holds, if any")
    parser.add_argument("--start-from", type=Path, help="begin the run with the weights of an exported pipeline")
    parser.add_argument("--stage", choices=_STAGES, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, with a checkpoint, after so long")
    parser.add_argument(
        "--anneal",
        action="store_true",
        help="decay the learning rate over the minutes of this call, where nobody knows how many iterations fit; "
        "not repeatable bit for bit",
    )
    parser.add_argument("--vae-minutes", type=float, default=math.inf, help="--stage all: then go on to the DiT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--workers", type=int, default=0, help="processes that render batches ahead (0: in this one)")
    parser.add_argument("--compile", action="store_true", help="the DiT's blocks, on a CPU: minutes, then quicker")
    parser.add_argument("--accept-vae", action="store_true", help="train the DiT on a VAE that misses its targets")
    parser.add_argument("--decoder-iterations", type=int, default=1500, help="of --stage decoder")
    parser.add_argument("--latent-noise", type=float, default=0.0, help="of --stage decoder: standard deviations")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--eval-minutes", type=float, default=20.0)
    parser.add_argument("--eval-prompts", type=int, default=64)
    parser.add_argument("--export", type=Path, help="pipeline directory to write after the chosen stage")
    parser.add_argument("--export-dtype", choices=("bfloat16", "float16"), default="bfloat16")
    recipe = parser.add_argument_group("recipe", "what decides the weights")
    recipe.add_argument("--seed", type=int, default=0)
    recipe.add_argument("--vae", choices=program.vae_shapes, default="small")
    recipe.add_argument("--dit", choices=program.dit_shapes, default="base")
    recipe.add_argument("--frames", type=int, default=17)
    recipe.add_argument("--height", type=int, default=64)
    recipe.add_argument("--width", type=int, default=64)
    recipe.add_argument("--vae-iterations", type=int, default=program.vae_iterations)
    recipe.add_argument("--dit-iterations", type=int, default=program.dit_iterations)
    recipe.add_argument("--batch-scale", type=float, default=1.0, help="multiplies every batch size")
    recipe.add_argument("--vae-lr", type=float, default=2e-3)
    recipe.add_argument("--dit-lr", type=float, default=2e-3)
    recipe.add_argument("--cached-clips", type=int, default=24576)
    recipe.add_argument("--cached-pairs", type=int, default=16384, help="further clips, all of two objects")
    return parser


def run_program(program: Program, argv: Sequence[str] | None = None) -> int:
    """Train, resume or export, as the arguments say."""
    args = _parser(program).parse_args(argv)
    recipe = Recipe(
        seed=args.seed,
        vae=args.vae,
        dit=args.dit,
        num_frames=args.frames,
        height=args.height,
        width=args.width,
        vae_iterations=args.vae_iterations,
        dit_iterations=args.dit_iterations,
        batch_scale=args.batch_scale,
        vae_lr=args.vae_lr,
        dit_lr=args.dit_lr,
        cached_clips=args.cached_clips,
        cached_pairs=args.cached_pairs,
    )
    recipe.check(program.vae_shapes, program.dit_shapes)
    if args.anneal and math.isinf(args.minutes):
        raise ValueError("anneal=True needs --minutes: the time over which to decay")
    if args.stage in ("export", "slim") and args.export is None:
        raise ValueError(f"stage={args.stage!r} needs --export DIRECTORY")
    if args.latent_noise < 0:
        raise ValueError(f"latent_noise={args.latent_noise} must be at least 0, nearest is 0")
    goes_on = args.resume or args.stage == "decoder"
    if args.stage in _TRAINS and not goes_on and (args.run / "recipe.json").exists():
        raise ValueError(f"run={str(args.run)!r} already holds a run: pass --resume to continue it")
    if args.stage == "slim":
        slim(args.run, args.export)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    begun = time.monotonic()
    compute = Compute(
        device=torch.device(args.device),
        workers=args.workers,
        deadline=begun + 60 * args.minutes,
        checkpoint_s=60 * args.checkpoint_minutes,
        eval_s=60 * args.eval_minutes,
        eval_prompts=args.eval_prompts,
        compile_blocks=args.compile,
        anneal=args.anneal,
    )
    if args.start_from is not None:
        start_from(program, args.start_from, args.run, recipe)
    if args.stage in _TRAINS:
        open_run(args.run, recipe)
    else:  # look at a run: its own recipe, whatever the other arguments
        recipe = Recipe(**json.loads((args.run / "recipe.json").read_text()))
    if args.stage == "evaluate-vae":
        state = torch.load(args.run / "vae.ckpt", map_location=compute.device, weights_only=True)
        vae = program.vae.from_state(state_of(state["ema"], "vae"), recipe, compute)
        scores = evaluate_vae(vae, recipe, args.eval_prompts)
        sys.stdout.write(json.dumps({"iteration": state["iteration"], **scores}) + "\n")
    if args.stage in ("vae", "all"):
        sooner = min(compute.deadline, begun + 60 * args.vae_minutes)
        done = train_vae(program.vae, args.run, recipe, replace(compute, deadline=sooner))
        if args.stage == "all" and not done and time.monotonic() > compute.deadline:
            return 0
    if args.stage == "decoder":
        train_decoder(program.vae, args.run, recipe, compute, args.decoder_iterations, latent_noise=args.latent_noise)
    if args.stage in ("dit", "all"):
        program.train_dit(args.run, recipe, compute, args.accept_vae)
    if args.export is not None:
        size = program.export(args.run, args.export, recipe, compute, getattr(torch, args.export_dtype))
        sys.stdout.write(f"{args.export}: {size} bytes\n")
    return 0
