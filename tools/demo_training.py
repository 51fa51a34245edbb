"""What trains a demo model, whatever its family: the recipe, files of a run, optimizers, averages and the loop.

Everything random is a function of (seed, stage, iteration), so the iteration number is the whole random state and a
run that was stopped and resumed ends in the same weights, bit for bit, as one that was not (same device and threads).
"""

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from tools.demo_model import DitSize, VaeSize

Log = Callable[[dict[str, Any]], None]
Losses = tuple[Tensor, dict[str, Tensor]]  # the loss, and parts of it for the curves

_FIXED = ("seed", "vae", "dit", "num_frames", "height", "width")  # of the recipe, in one run


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides the weights. What `_FIXED` does not name may change between calls of one run."""

    seed: int
    vae: VaeSize
    dit: DitSize
    num_frames: int
    height: int
    width: int
    vae_iterations: int
    dit_iterations: int
    batch_scale: float
    vae_lr: float
    dit_lr: float
    cached_clips: int
    cached_pairs: int = 0  # further clips, all of two objects

    def check(self, vae_shapes: Mapping[VaeSize, Any], dit_shapes: Mapping[DitSize, Any]) -> None:
        """Refuse what cannot train, or a size that the family does not have.

        Raises:
            ValueError: names the field, the value and the nearest valid value.
        """
        for name, value, shapes in (("vae", self.vae, vae_shapes), ("dit", self.dit, dit_shapes)):
            if value not in shapes:
                sizes = [str(size) for size in shapes]  # the smallest is a toy: the nearest is the one after it
                raise ValueError(f"{name}={value!r} must be one of {', '.join(sizes)}, nearest is {sizes[1]!r}")
        if self.num_frames < 5 or self.num_frames % 4 != 1:
            near = max(5, 4 * round((self.num_frames - 1) / 4) + 1)
            raise ValueError(f"num_frames={self.num_frames} must be 1 + 4*k and at least 5, nearest is {near}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 32 or value % 16:
                near = max(32, 16 * round(value / 16))
                raise ValueError(f"{name}={value} must be a multiple of 16, at least 32, nearest is {near}")
        for name in ("vae_iterations", "dit_iterations", "cached_clips", "batch_scale", "vae_lr", "dit_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.cached_pairs < 0:
            raise ValueError(f"cached_pairs={self.cached_pairs} must be at least 0, nearest is 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Where and how long: nothing here is meant to change the result (other devices round differently)."""

    device: torch.device
    workers: int
    deadline: float  # of time.monotonic()
    checkpoint_s: float
    eval_s: float
    eval_prompts: int
    compile_blocks: bool = False  # of the DiT: minutes at the start of each call, then quicker
    anneal: bool = False  # decay the learning rate over this call's time instead of by iteration
    stop_after: int | None = None  # iterations of this call, for tests

    def autocast(self) -> torch.autocast:
        """bfloat16 arithmetic over float32 master weights."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def kept_scores(self) -> AbstractContextManager[None]:
        """Attention in the form that is quick to differentiate on this device.

        torch's fused attention has a backward on CPUs that is several times slower at heads this small.
        """
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()

    def generator(self, *key: int) -> torch.Generator:
        """A generator on the device that only `key` decides."""
        word = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        return torch.Generator(self.device).manual_seed(word % 2**63)


# --- files ----------------------------------------------------------------------------------------------------------


def save_atomic(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a reader finds the old one or the new one, never half of one."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    with temporary.open("rb") as f:
        os.fsync(f.fileno())
    temporary.rename(path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, complete or not at all."""
    temporary = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    temporary.rename(path)


def write_json(content: dict[str, Any], file: Path) -> None:
    """Write a JSON file, complete or not at all."""
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(file)


def open_run(run: Path, recipe: Recipe) -> None:
    """Create the run directory, or make sure that the recipe goes on with the run that it holds.

    Raises:
        ValueError: a field named in `_FIXED` differs.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = run / "recipe.json"
    if file.exists():
        before = json.loads(file.read_text())
        for name in _FIXED:
            old, new = before[name], getattr(recipe, name)
            if old != new:
                raise ValueError(f"{name}={new!r} differs from {old!r} of this run: begin another directory")
    write_json(asdict(recipe), file)


def open_log(run: Path, stage: str, iteration: int) -> Log:
    """Append JSON lines to curves.jsonl and to standard output, forgetting what came after the checkpoint."""
    file = run / "curves.jsonl"
    if file.exists():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [x for x in lines if x["stage"] != stage or x["iteration"] <= iteration]
        temporary = file.with_suffix(".part")
        temporary.write_text("".join(json.dumps(x) + "\n" for x in kept))
        temporary.rename(file)

    def log(entry: dict[str, Any]) -> None:
        line = json.dumps({"stage": stage, **entry})
        with file.open("a") as f:
            f.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    return log


# --- the loop -------------------------------------------------------------------------------------------------------


class Ema:
    """Exponential moving average of the trainable parameters, quick to forget at first."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.modules = modules
        self.values = {
            f"{name}.{key}": value.detach().clone()
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        live = [v for m in self.modules.values() for v in m.state_dict().values()]
        torch._foreach_lerp_(list(self.values.values()), live, 1 - decay)

    def state_of(self, name: str) -> dict[str, Tensor]:
        """State dict of one module."""
        return state_of(self.values, name)


def state_of(values: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """State dict of one module out of averages of several."""
    prefix = f"{name}."
    return {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}


def load_averages(modules: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> None:
    """Give modules their averaged weights, which do not change from here on."""
    for name, module in modules.items():
        module.load_state_dict(state_of(values, name))
        module.eval().requires_grad_(False)


def learning_rate(peak: float, iteration: int, total: int, decay_from: float) -> float:
    """Warm-up over 100 iterations, constant, and from `decay_from` of the total a half cosine to 2 % of the peak."""
    warm = min(1.0, (iteration + 1) / 100)
    late = max(0.0, (iteration / total - decay_from) / (1 - decay_from))
    return peak * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, late))))


class _Batches(Dataset[Any]):
    """Item i is the whole batch of iteration i: any worker makes it, in any order."""

    def __init__(self, make: Callable[[int], Any], total: int) -> None:
        self.make = make
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, iteration: int) -> Any:
        return self.make(iteration)


def batches(make: Callable[[int], Any], start: int, total: int, compute: Compute) -> Iterator[Any]:
    """make(start), ..., make(total - 1), made ahead by worker processes where `compute` has some."""
    loader: DataLoader[Any] = DataLoader(
        _Batches(make, total),
        batch_size=None,
        sampler=range(start, total),
        num_workers=compute.workers,
        prefetch_factor=4 if compute.workers else None,
        pin_memory=compute.device.type == "cuda",
        multiprocessing_context="forkserver" if compute.workers else None,
    )
    return iter(loader)


class Optimizers:
    """Muon for the matrices inside a network, AdamW for everything else, with one learning rate for both.

    A convolution counts as a matrix of its output channels by everything else. In 300 iterations from scratch on the
    same batches the VAE came to 19.1 dB with it and to 15.1 dB with AdamW alone (`docs/demo_model.md`).

    Source: Jordan et al. 2024, Muon (github.com/KellerJordan/Muon); the common rate, Liu et al. 2025
    (arXiv 2502.16982), section 2.2, in `torch.optim.Muon`.
    """

    def __init__(self, modules: dict[str, nn.Module], lr: float, not_muon: Sequence[str]) -> None:
        """`not_muon`: words in the names of parameters that stay with AdamW: embeddings, ends of the network."""
        named = [
            (f"{name}.{key}", p)
            for name, module in modules.items()
            for key, p in module.named_parameters()
            if p.requires_grad
        ]
        self.matrices = [p for key, p in named if p.ndim >= 2 and not any(word in key for word in not_muon)]
        self.views = [p.detach().flatten(1).requires_grad_() for p in self.matrices]  # the same memory
        inside = {id(p) for p in self.matrices}
        rest = [p for _, p in named if id(p) not in inside]
        self.parts: list[torch.optim.Optimizer] = []
        if self.views:
            self.parts.append(torch.optim.Muon(self.views, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True))

    def step(self, lr: float) -> None:
        """One update with the gradients that the parameters hold."""
        for view, matrix in zip(self.views, self.matrices, strict=True):
            view.grad = None if matrix.grad is None else matrix.grad.flatten(1)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for matrix in self.matrices:
            matrix.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each part."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take up the state that `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Trainer:
    """The loop of any stage: optimizer, EMA, checkpoints, curves, and the stop at the deadline."""

    def __init__(
        self,
        *,
        stage: str,
        run: Path,
        recipe: Recipe,
        modules: dict[str, nn.Module],
        total: int,
        lr: float,
        decay_from: float,
        ema_decay: float,
        not_muon: Sequence[str],
        compute: Compute,
    ) -> None:
        self.stage, self.modules, self.total, self.recipe = stage, modules, total, recipe
        self.lr, self.decay_from, self.compute = lr, decay_from, compute
        self.file = run / f"{stage}.ckpt"
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = Optimizers(modules, lr, not_muon)
        self.ema = Ema(modules, ema_decay)
        self.iteration, self.seconds = 0, 0.0
        self.evaluation: dict[str, Any] = {}  # the last one
        if self.file.exists():
            state = torch.load(self.file, map_location=compute.device, weights_only=True)
            self.ema.values = {key: state["ema"][key] for key in self.ema.values}  # in the order of the modules
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name] if "modules" in state else self.ema.state_of(name))
            if "optimizer" in state:  # a slim checkpoint has neither: it starts from the average, with fresh moments
                self.optimizer.load_state_dict(state["optimizer"])
            self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.log = open_log(run, stage, self.iteration)

    def save(self) -> None:
        """Write the checkpoint: weights, optimizer, EMA, iteration (which is the random state), seconds so far."""
        save_atomic(
            {
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.values,
                "iteration": self.iteration,
                "seconds": self.seconds,
            },
            self.file,
        )

    def train(
        self,
        make: Callable[[int], Any],
        loss_of: Callable[[Any, int], Losses],
        evaluate: Callable[[], dict[str, Any]],
    ) -> bool:
        """Train until the total, the deadline or stop_after, and checkpoint; True when the total is reached."""
        self.log({"iteration": self.iteration, "recipe": asdict(self.recipe), "device": str(self.compute.device)})
        self._train(make, loss_of, evaluate)
        self._evaluate(evaluate)
        return self.iteration >= self.total

    def _evaluate(self, evaluate: Callable[[], dict[str, Any]]) -> None:
        self.evaluation = evaluate()
        self.log({"iteration": self.iteration, "evaluation": self.evaluation})

    def _train(
        self,
        make: Callable[[int], Any],
        loss_of: Callable[[Any, int], Losses],
        evaluate: Callable[[], dict[str, Any]],
    ) -> None:
        compute = self.compute
        first, begun = self.iteration, time.monotonic()
        saved = evaluated = first_moment = begun
        window: list[dict[str, Tensor]] = []
        for batch in batches(make, self.iteration, self.total, compute):
            stopping = time.monotonic() > compute.deadline
            if stopping or (compute.stop_after is not None and self.iteration - first >= compute.stop_after):
                break
            rate = learning_rate(self.lr, self.iteration, self.total, self.decay_from)
            if compute.anneal:
                passed = (time.monotonic() - first_moment) / (compute.deadline - first_moment)
                rate = min(rate, self.lr * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, passed)))))
            loss, parts = loss_of(batch, self.iteration)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step(rate)
            self.ema.update(self.iteration)
            self.iteration += 1
            window.append({"loss": loss.detach(), "grad_norm": norm.detach(), **parts})
            now = time.monotonic()
            if self.iteration % 50 == 0:
                entry: dict[str, Any] = {"iteration": self.iteration, "seconds": round(self.seconds + now - begun, 1)}
                for key in window[0]:
                    entry[key] = round(float(torch.stack([w[key] for w in window]).mean()), 5)
                if not math.isfinite(entry["loss"]):
                    raise RuntimeError(f"loss={entry['loss']} at iteration {self.iteration}: resume with a lower rate")
                self.log(entry)
                window = []
            if now - saved > compute.checkpoint_s:
                self.seconds += now - begun
                begun = saved = now
                self.save()
            if now - evaluated > compute.eval_s:
                self._evaluate(evaluate)
                evaluated = time.monotonic()
        self.seconds += time.monotonic() - begun
        self.save()


def keep_freed_memory() -> None:
    """Tell glibc to keep big freed blocks: a training step else spends most of its time on page faults.

    No effect, and no error, where the C library is not glibc.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from <malloc.h>
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
