"""Where two runs part inside the denoiser: the first step, tensor and block that differ.

A recorded run is a folder `<id>.steps` with one file per denoising step, `step_0003.safetensors`, counted from 0. Its
tensors carry names; the metadata holds `format` = "videopipe.steps/1" and `order`, a JSON list of the names in the
order in which they came to be, so that the first difference is the earliest one. Names in use:

    pass.0/transformer_blocks.4/0   first output of that block in the first forward pass of the step (second pass: CFG)
    pass.0/prediction               what the denoiser returned in that pass
    latents                         latents after the step

Tensors are whole: a run on many ranks gathers them before it writes. Only the steps asked for hold blocks.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from videopipe.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "videopipe.steps/1"
_STEP = re.compile(r"step_(\d{4,})\.safetensors")
_BLOCK = re.compile(r"^(pass\.\d+)/(.+)/\d+$")

Reason = Literal["value", "shape", "dtype", "missing", "not finite"]


class TensorDifference(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor that differs. `rel_l2` is the norm of the difference over the norm of REF's tensor.

    `index` is where the largest difference sits; for anything but values it is None and the numbers are infinite.
    """

    step: int
    name: str
    reason: Reason
    max_abs: float
    rel_l2: float
    index: tuple[int, ...] | None
    detail: str

    @property
    def block(self) -> str | None:
        """The block that put the tensor out, None for tensors outside blocks."""
        match = _BLOCK.match(self.name)
        return match.group(2) if match else None

    def __str__(self) -> str:
        place = f"step {self.step}, " + (f"block {self.block} ({self.name})" if self.block else f"tensor {self.name}")
        return f"{place}: {self.detail}"


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """The first difference of two recorded runs, in the order in which the tensors came to be.

    `first` differs by more than the tolerance; `first_bitwise` at all. `compared` counts tensors.
    """

    num_steps: int
    compared: int
    tolerance: float
    first: TensorDifference | None
    first_bitwise: TensorDifference | None

    def lines(self) -> tuple[str, ...]:
        """What to print."""
        if self.first_bitwise is None:
            return (f"recorded steps: all {self.compared} tensors of {self.num_steps} steps are equal",)
        if self.first is None:
            less = f"recorded steps: nothing beyond rel_l2 {self.tolerance:g} in {self.num_steps} steps"
            return (less, f"first not bit-equal: {self.first_bitwise}")
        lines = (f"runs part at {self.first}",)
        return lines if self.first_bitwise == self.first else (*lines, f"first not bit-equal: {self.first_bitwise}")


def steps_folder(clip: Path) -> Path:
    """Where the recorded steps of a clip lie: `<id>.steps` beside it."""
    return clip.parent / f"{clip.name if clip.is_dir() else clip.stem}.steps"


def write_step(folder: Path, step: int, tensors: Mapping[str, "Tensor"]) -> Path:
    """Write the tensors of one step, in the order of the mapping.

    Args:
        folder: `<id>.steps`, made if missing.
        step: counted from 0.
        tensors: any shapes and dtypes; copied to the host.
    Returns:
        The file written.
    Raises:
        ValueError: a negative step, or no tensors.
    """
    from safetensors.torch import save_file

    if step < 0:
        raise ValueError(f"step={step} must be at least 0, nearest is 0")
    if not tensors:
        raise ValueError(f"step {step}: no tensors to record")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:04d}.safetensors"
    metadata = {"format": FORMAT, "order": msgspec.json.encode(list(tensors)).decode()}
    host = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(host, str(partial), metadata=metadata)
    return path


def recorded_steps(folder: Path) -> dict[int, Path]:
    """The step files of a folder by step.

    Raises:
        ValueError: there are none.
    """
    matches = ((_STEP.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    found = {int(match.group(1)): path for match, path in matches if match}
    if not found:
        raise ValueError(f"{folder}: holds no recorded steps (step_0000.safetensors and on)")
    return dict(sorted(found.items()))


def trace(ref: Path, cand: Path, *, tolerance: float = 0.0, trim: bool = False) -> Trace:
    """Find the first step, tensor and block in which two recorded runs differ.

    Args:
        ref: the folder `<id>.steps` of the run taken as right.
        cand: that of the run to judge.
        tolerance: largest relative L2 difference that passes; 0 asks for equal values.
        trim: where shapes differ in one dim only, compare the common leading part, such as text tokens that one run
            pads and the other trims.
    Raises:
        ValueError: no recorded steps, a file that is none, or a negative tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance:g} must be at least 0, nearest is 0")
    left, right = recorded_steps(ref), recorded_steps(cand)
    compared, bitwise = 0, None
    for step in dict.fromkeys(sorted([*left, *right])):
        if step not in left or step not in right:
            side = "CAND" if step in left else "REF"
            missing = _lacking(step, "(all)", f"not recorded in {side}")
            return _result(left, right, compared, tolerance, missing, bitwise or missing)
        for difference in _step_differences(step, left[step], right[step], trim):
            compared += 1
            if difference is None:
                continue
            bitwise = bitwise or difference
            if difference.reason != "value" or difference.rel_l2 > tolerance:
                return _result(left, right, compared, tolerance, difference, bitwise)
    return _result(left, right, compared, tolerance, None, bitwise)


def _result(
    left: dict[int, Path],
    right: dict[int, Path],
    compared: int,
    tolerance: float,
    first: TensorDifference | None,
    bitwise: TensorDifference | None,
) -> Trace:
    steps = len(set(left) | set(right))
    return Trace(num_steps=steps, compared=compared, tolerance=tolerance, first=first, first_bitwise=bitwise)


def _step_differences(step: int, ref: Path, cand: Path, trim: bool) -> Iterator[TensorDifference | None]:
    """One answer per tensor of REF in order, then one for each that only CAND has; one pair is held at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(ref), framework="pt") as a, safe_open(str(cand), framework="pt") as b:
            names, others = _order(ref, a.metadata(), list(a.keys())), _order(cand, b.metadata(), list(b.keys()))
            for name in names:
                if name not in others:
                    yield _lacking(step, name, "not recorded in CAND")
                else:
                    yield _difference(step, name, a.get_tensor(name), b.get_tensor(name), trim)
            for name in others:
                if name not in names:
                    yield _lacking(step, name, "not recorded in REF")
    except SafetensorError as error:
        raise ValueError(f"{ref} or {cand}: not a readable safetensors file ({error})") from error


def _order(path: Path, metadata: dict[str, str] | None, keys: list[str]) -> list[str]:
    if not metadata or metadata.get("format") != FORMAT:
        found = (metadata or {}).get("format")
        raise ValueError(f"{path}: format={found!r} must be {FORMAT!r}")
    order = msgspec.json.decode(metadata.get("order", "[]"), type=list[str])
    if sorted(order) != sorted(keys):
        raise ValueError(f"{path}: `order` names {len(order)} tensors, the file holds {len(keys)} others")
    return order


def _lacking(step: int, name: str, detail: str) -> TensorDifference:
    return TensorDifference(
        step=step, name=name, reason="missing", max_abs=math.inf, rel_l2=math.inf, index=None, detail=detail
    )


def _difference(step: int, name: str, ref: "Tensor", cand: "Tensor", trim: bool) -> TensorDifference | None:
    """How two tensors differ; None if they are equal."""
    import torch

    def other(reason: Reason, detail: str) -> TensorDifference:
        return TensorDifference(
            step=step, name=name, reason=reason, max_abs=math.inf, rel_l2=math.inf, index=None, detail=detail
        )

    if ref.shape != cand.shape:
        apart = [d for d, (m, n) in enumerate(zip(ref.shape, cand.shape, strict=False)) if m != n]
        if not trim or ref.ndim != cand.ndim or len(apart) != 1:
            return other("shape", f"shape {list(ref.shape)} in REF, {list(cand.shape)} in CAND")
        common = min(ref.shape[apart[0]], cand.shape[apart[0]])
        ref, cand = ref.narrow(apart[0], 0, common), cand.narrow(apart[0], 0, common)
    if ref.dtype != cand.dtype and not (ref.is_floating_point() and cand.is_floating_point()):
        return other("dtype", f"dtype {ref.dtype} in REF, {cand.dtype} in CAND")
    if ref.dtype == cand.dtype and torch.equal(ref, cand):
        return None
    a, b = ref.double(), cand.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        counts = [int((~torch.isfinite(x)).sum()) for x in (a, b)]
        return other("not finite", f"{counts[0]} values of REF and {counts[1]} of CAND are NaN or infinite")
    apart_by = (a - b).abs()
    largest = float(apart_by.max()) if apart_by.numel() else 0.0
    if largest == 0.0:
        return None
    norm = float(a.norm())
    relative = float((a - b).norm()) / norm if norm > 0 else math.inf
    index = tuple(int(i) for i in torch.unravel_index(apart_by.argmax(), apart_by.shape))
    detail = f"rel_l2 {relative:.3g}, max_abs {largest:.3g} at {list(index)}"
    return TensorDifference(
        step=step, name=name, reason="value", max_abs=largest, rel_l2=relative, index=index, detail=detail
    )
