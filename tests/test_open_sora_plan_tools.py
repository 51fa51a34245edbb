"""The parity tool notices what differs, the cost formulas equal what torch counts."""

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from pipelines.models.open_sora_plan import OpenSoraPlanBlock, OpenSoraPlanTransformer3DModel, Rotary3D
from pipelines.models.skip_sparse import DENSE, SkipSparse
from pipelines.models.wf_vae import WFVAEModel
from tools import cost_open_sora_plan, parity_opensora
from tools.cost_open_sora_plan import Denoiser, step_cost
from tools.parity_opensora import TINY_VAE, Job, compare, random_weights

# --- parity

FAKE_VAE = """
from pathlib import Path
from types import SimpleNamespace
from safetensors.torch import load_file

class WFVAEModel:
    def __init__(self, **config):
        self.answers = load_file(Path(__file__).with_name("answers.safetensors"))

    def load_state_dict(self, weights, strict):
        return ["encoder.wavelet_tranform_l1.aa"], []

    def to(self, device):
        return self

    eval = lambda self: self
    encode = lambda self, x: SimpleNamespace(latent_dist=SimpleNamespace(parameters=self.answers["moments"]))
    decode = lambda self, z: SimpleNamespace(sample=self.answers["pixels"])
"""


def fake_python(folder: Path, answers: dict[str, Tensor]) -> str:
    """An interpreter that finds a package `opensora` whose VAE gives these answers."""
    module = folder / "opensora/models/causalvideovae/model/vae/modeling_wfvae.py"
    module.parent.mkdir(parents=True)
    module.write_text(FAKE_VAE)
    save_file(answers, module.with_name("answers.safetensors"))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_parity_notices_what_differs(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = {"video": torch.rand(1, 3, 5, 8, 8, generator=g), "latents": torch.randn(1, 8, 2, 1, 1, generator=g)}
    model = random_weights(WFVAEModel(**TINY_VAE), g)
    answers = parity_opensora.run_ours(model.eval(), inputs)
    answers["pixels"] = answers["pixels"] + 1e-3
    job = Job(name="vae", part="vae", config=TINY_VAE, model=model, inputs={"clip": inputs})
    python = fake_python(tmp_path, answers)
    assert parity_opensora.is_importable(python)
    worst = {d.name: d.worst for d in compare(job, python)}
    assert worst["moments"] == 0
    assert worst["pixels"] == pytest.approx(1e-3, rel=1e-2)


def test_parity_says_how_to_get_the_official_code() -> None:
    result = CliRunner().invoke(parity_opensora.app, ["--python", sys.executable])
    assert result.exit_code == 3
    assert "git clone --branch v1.3.1" in result.output


def test_parity_runs_both_parts() -> None:
    first = {}
    for job in parity_opensora.tiny_jobs():
        first.setdefault(job.part, job)
        if len(first) == 2:
            break
    for job in first.values():
        given = next(iter(job.inputs.values()))
        for name, value in parity_opensora.run_ours(job.model.eval(), given).items():
            assert value.std() > 0.05, (job.name, name)


# --- cost


@pytest.mark.parametrize("sparse_n", [1, 4])
@pytest.mark.parametrize("latents", [(24, 44, 80), (3, 10, 14)])
def test_flops_equal_what_torch_counts(sparse_n: int, latents: tuple[int, int, int]) -> None:
    frames, rows, cols = latents
    with torch.device("meta"):
        model = OpenSoraPlanTransformer3DModel(sparse_n=sparse_n)
        noisy, prompt, t = torch.empty(2, 8, *latents), torch.empty(2, 1, 512, 4096), torch.empty(2)
    with torch.no_grad():
        text = model.encode_text(prompt)
        with FlopCounterMode(display=False) as counter:
            model(noisy, t, text=text)
    cost = step_cost(frames * rows * cols // 4, sparse_n=sparse_n)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive at once, except those `known` before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = {t.untyped_storage()._cdata: 0 for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.live:
                storage = value.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


@pytest.mark.parametrize("sparse", [DENSE, SkipSparse(kind="single", k=4), SkipSparse(kind="group", k=4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_peak_memory_of_a_block(sparse: SkipSparse, dtype: torch.dtype) -> None:
    tokens, heads, dim = 512, 4, 96
    block = OpenSoraPlanBlock(num_heads=heads, head_dim=dim, sparse=sparse).to(dtype).eval()
    x, modulation = torch.randn(2, tokens, heads * dim, dtype=dtype), torch.randn(2, 6, heads * dim, dtype=dtype)
    text = block.text_keys_values(torch.randn(2, 8, heads * dim, dtype=dtype))
    rope = Rotary3D(dim, (1.0, 1.0, 1.0))(8, 8, 8)
    with PeakBytes([*block.parameters(), x, modulation, *text, *rope]) as counter:
        block(x, modulation, rope, text)
    model = Denoiser(num_layers=0, num_heads=heads, head_dim=dim, parameters=0)
    formula = step_cost(tokens, sparse_n=1, text_tokens=8, item_bytes=x.element_size(), model=model).peak_bytes
    assert x.nbytes + counter.peak == pytest.approx(formula, rel=0.02)


def test_skip_sparse_attention_is_nearly_three_times_less() -> None:
    dense, sparse = (step_cost(21_120, sparse_n=n) for n in (1, 4))
    assert dense.self_attention_flops / sparse.self_attention_flops == pytest.approx(32 / (4 + 28 / 4))
    assert dense.linear_flops == sparse.linear_flops
    assert sparse.moved_bytes > dense.moved_bytes  # regrouping costs traffic


def test_table_names_the_size_that_does_not_fit() -> None:
    result = CliRunner().invoke(cost_open_sora_plan.app, [])
    assert result.exit_code == 0
    assert "| one step | 470.4 TFLOP | 297.7 TFLOP | 1.58 |" in result.output
    result = CliRunner().invoke(cost_open_sora_plan.app, ["--height", "350"])
    assert result.exit_code == 2
    assert "height=350 must be a multiple of 16, nearest is 352" in result.output
