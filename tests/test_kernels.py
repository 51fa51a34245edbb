"""Attention kernels: each agrees with the textbook formula, masked or not; what is missing says how to get it."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from dit_group.attention import MERGING, STRATEGIES
from dit_group.kernels import (
    KERNELS,
    NEEDS,
    WITH_LSE,
    Kernel,
    KernelWithLse,
    check_kernel,
    flash_attention_2,
    flash_attention_3,
    kernel_with_lse,
    math,
    math_with_lse,
    sage,
    sdpa_math,
)
from videopipe.config import AttentionConfig, AttentionKernel, ConfigError, load_config

CPU = torch.device("cpu")
ON_CPU = ["sdpa", "sdpa-flash", "sdpa-math", "math"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(2, 5, 7, 3, 8), (2, 33, 29, 2, 16), (1, 1, 40, 1, 6), (2, 4, 1, 2, 8)]  # B, S_q, S, N, D


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    B, S_q, S, N, D = shape
    generator = torch.Generator().manual_seed(S_q * 100 + S)
    q, k, v = (
        torch.randn(B, rows, N, D, generator=generator, dtype=torch.float64).to(device, dtype) for rows in (S_q, S, S)
    )
    return q, k, v


def mask_of(shape: tuple[int, ...]) -> Tensor:
    """Every third key hidden, in each sample others; each sample sees at least one."""
    B, S = shape[0], shape[2]
    mask = torch.arange(S)[None] % 3 != torch.tensor([[1], [2]])[:B]
    mask[:, 0] = True
    return mask


def textbook(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax by its definition, one query and one head at a time, in float64."""
    B, S_q, N, D = q.shape
    out = torch.zeros(B, S_q, N, D, dtype=torch.float64)
    lse = torch.full((B, N, S_q), float("-inf"), dtype=torch.float64)
    for b in range(B):
        seen = torch.ones(k.shape[1], dtype=torch.bool) if mask is None else mask[b]
        for n in range(N):
            keys, values = k[b, seen, n].double(), v[b, seen, n].double()
            for i in range(S_q if len(keys) else 0):
                weights = (keys @ q[b, i, n].double() / D**0.5).exp()
                out[b, i, n] = weights @ values / weights.sum()
                lse[b, n, i] = weights.sum().log()
    return out, lse


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max())


def test_tables_and_configuration_name_the_same() -> None:
    assert set(get_args(AttentionKernel)) == set(KERNELS)
    assert set(NEEDS) <= set(KERNELS) and set(WITH_LSE) <= set(KERNELS.values())
    strategies = get_args(AttentionConfig.__annotations__["strategy"])
    assert set(strategies) == set(STRATEGIES) and set(MERGING) <= set(STRATEGIES)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ON_CPU)
def test_kernels_agree_with_the_textbook(name: str, dtype: torch.dtype) -> None:
    check_kernel(name, CPU)
    for shape in SHAPES:
        q, k, v = tensors(shape, dtype)
        for mask in (None, mask_of(shape)):
            out = KERNELS[name](q, k, v, mask)
            assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
            assert distance(out, textbook(q, k, v, mask)[0]) <= TOLERANCE[dtype], (shape, mask is None)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["sdpa", "sdpa-flash", "math"])
def test_log_sum_exp_agrees_with_the_textbook(name: str, dtype: torch.dtype) -> None:
    check_kernel(name, CPU, with_lse=True)
    for shape in SHAPES:
        q, k, v = tensors(shape, dtype)
        blind = mask_of(shape)
        blind[-1] = False  # a sample that sees nothing: zero, and minus infinity
        for mask in (None, mask_of(shape), blind):
            out, lse = kernel_with_lse(KERNELS[name])(q, k, v, mask)
            expected, expected_lse = textbook(q, k, v, mask)
            assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
            assert lse.dtype == (torch.float64 if name == "math" or dtype == torch.float64 else torch.float32)
            assert distance(out, expected) <= TOLERANCE[dtype], (shape, mask)
            assert torch.equal(lse.isneginf(), expected_lse.isneginf())
            finite = ~expected_lse.isneginf()
            if finite.any():
                assert distance(lse[finite], expected_lse[finite]) <= max(TOLERANCE[torch.float32], TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(2, 0, 7, 3, 8), (2, 5, 7, 0, 8), (2, 5, 0, 3, 8)])
def test_nothing_to_do_is_no_crash(shape: tuple[int, ...]) -> None:
    q, k, v = tensors(shape, torch.float32)
    for mask in (None, torch.ones(2, shape[2], dtype=torch.bool)):
        for name in ("sdpa", "sdpa-flash", "sdpa-math"):
            if shape[2]:
                assert KERNELS[name](q, k, v, mask).shape == q.shape
        for kernel in (*WITH_LSE.values(),):
            out, lse = kernel(q, k, v, None)
            assert out.shape == q.shape and not out.any()
            assert lse.shape == (2, shape[3], shape[1]) and bool(lse.isneginf().all())


def test_the_configuration_knows_which_kernels_merge() -> None:
    for name, kernel in KERNELS.items():
        overrides = [f"model.attention_kernel={name}", "attention.strategy=usp"]
        if kernel in WITH_LSE:
            assert load_config(None, overrides).model.attention_kernel == name
        else:
            with pytest.raises(ConfigError, match=f"'{name}' gives no log-sum-exp.*nearest is 'sdpa'"):
                load_config(None, overrides)


# -- twins: mistakes that these tests must see


def test_mistakes_are_far_from_the_textbook() -> None:
    shape = SHAPES[1]
    q, k, v = tensors(shape, torch.float64)
    mask = mask_of(shape)
    out, lse = textbook(q, k, v, mask)
    twins: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "scale of another head size": lambda: math_with_lse(q * 1.01, k, v, mask),
        "mask turned round": lambda: math_with_lse(q, k, v, ~mask),
        "no mask": lambda: math_with_lse(q, k, v, None),
        "logarithm to base 2": lambda: (out, lse / torch.tensor(2.0).log()),
        "maximum instead of sum": lambda: (out, lse - 1),
    }
    for name, twin in twins.items():
        wrong, wrong_lse = twin()
        assert distance(wrong, out) > 1e-3 or distance(wrong_lse, lse) > 1e-3, name


# -- kernels of other packages, through stand-ins that follow their documented calls


class Package:
    """Stands in for an installed package: the textbook formula behind the package's own call."""

    def __init__(self, **functions: Callable[..., object]) -> None:
        self.__dict__.update(functions)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    assert k.shape[1], "these packages refuse empty sequences"
    return math_with_lse(q, k, v, None)


def flash_2(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False) -> object:
    out, lse = attend(q, k, v)
    return (out, lse, None) if return_attn_probs else out


def flash_3_then(q: Tensor, k: Tensor, v: Tensor) -> object:
    return attend(q, k, v)


def sage_1(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", return_lse: bool = False) -> object:
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v)
    return (out, lse) if return_lse else out


PACKAGES: list[tuple[Kernel, str, Package]] = [
    (flash_attention_2, "flash_attn", Package(flash_attn_func=flash_2)),
    (flash_attention_3, "flash_attn_interface", Package(flash_attn_func=lambda q, k, v: attend(q, k, v)[0])),
    (flash_attention_3, "flash_attn_interface", Package(flash_attn_func=flash_3_then)),
    (sage, "sageattention", Package(sageattn=sage_1)),
]


@pytest.mark.parametrize(("kernel", "name", "package"), PACKAGES)
def test_other_packages_are_called_as_documented(
    kernel: Kernel, name: str, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, package)  # type: ignore[arg-type]
    shape = SHAPES[1]
    q, k, v = tensors(shape, torch.float64)
    blind = mask_of(shape)
    blind[1] = False
    for mask in (None, mask_of(shape), blind):
        expected, _ = textbook(q, k, v, mask)
        assert distance(kernel(q, k, v, mask), expected) <= 1e-12


LSE_PACKAGES: list[tuple[KernelWithLse, str, Package]] = [
    (WITH_LSE[flash_attention_2], "flash_attn", Package(flash_attn_func=flash_2)),
    (
        WITH_LSE[flash_attention_3],
        "flash_attn_interface",
        Package(flash_attn_func=lambda q, k, v, return_attn_probs=False: attend(q, k, v)),
    ),
    (WITH_LSE[flash_attention_3], "flash_attn_interface", Package(flash_attn_func=flash_3_then)),
    (WITH_LSE[sage], "sageattention", Package(sageattn=sage_1)),
]


@pytest.mark.parametrize(("kernel", "name", "package"), LSE_PACKAGES)
def test_other_packages_give_their_log_sum_exp(
    kernel: KernelWithLse, name: str, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, package)  # type: ignore[arg-type]
    shape = SHAPES[1]
    q, k, v = tensors(shape, torch.float64)
    blind = mask_of(shape)
    blind[1] = False
    for mask in (None, mask_of(shape), blind):
        out, lse = kernel(q, k, v, mask)
        expected, expected_lse = textbook(q, k, v, mask)
        assert distance(out, expected) <= 1e-12
        assert torch.equal(lse.isneginf(), expected_lse.isneginf())
        finite = ~lse.isneginf()
        assert distance(lse[finite], expected_lse[finite]) <= 1e-12


# -- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sdp", "model.attention_kernel='sdp' must be one of 'sdpa', .*; nearest is 'sdpa'"),
        ("flash-attention-2", "needs the package flash_attn: pip install flash-attn .*; nearest is 'sdpa'"),
        ("flash-attention-3", "needs the package flash_attn_interface: build .*hopper.*; nearest is 'sdpa'"),
        ("sage", "needs the package sageattention: pip install .*SageAttention; nearest is 'sdpa'"),
        ("sdpa-efficient", "needs a CUDA device, not cpu; nearest is 'sdpa'"),
        ("sdpa-cudnn", "needs a CUDA device, not cpu; nearest is 'sdpa'"),
    ],
)
def test_a_kernel_that_cannot_run_here_says_what_it_needs(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kernel(name, CPU)


def test_a_package_that_is_there_still_needs_its_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('must not be imported to be found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'flash-attention-2' needs a CUDA device, not cpu"):
        check_kernel("flash-attention-2", CPU)


def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=re.escape("'sdpa-flash' needs compute capability 8.0, this device has 7.5")):
        check_kernel("sdpa-flash", torch.device("cuda", 0))
    check_kernel("sdpa-efficient", torch.device("cuda", 0))
    check_kernel("sdpa-flash", torch.device("cuda"), look_at_device=False)


def test_numbers_of_32_bit_are_refused_where_a_kernel_has_16() -> None:
    cuda = torch.device("cuda")
    for name in ("sdpa-flash", "sdpa-cudnn"):
        with pytest.raises(ValueError, match=r"needs model.dtype='bfloat16' or 'float16', not 'float32'"):
            check_kernel(name, cuda, torch.float32, look_at_device=False)
        check_kernel(name, cuda, torch.float16, look_at_device=False)
    for name in ("sdpa", "sdpa-efficient", "sdpa-math", "math"):
        check_kernel(name, cuda, torch.float32, look_at_device=False)
    check_kernel("sdpa-flash", CPU, torch.float32)


def test_a_kernel_without_log_sum_exp_is_refused_by_ring() -> None:
    with pytest.raises(ValueError, match=r"'sdpa-math' gives no log-sum-exp, which .* need; nearest is 'sdpa'"):
        check_kernel("sdpa-math", CPU, with_lse=True)
    check_kernel("sdpa-math", CPU)
    with pytest.raises(ValueError, match="kernel=sdpa_math gives no log-sum-exp"):
        kernel_with_lse(sdpa_math)


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_agree_with_the_textbook_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    try:
        check_kernel(name, torch.device("cuda", 0), dtype)
    except ValueError as why:
        pytest.skip(str(why))
    tolerance = 0.1 if name == "sage" else 3 * TOLERANCE[dtype]
    for shape in ((2, 130, 97, 3, 64), (1, 257, 300, 2, 128), (2, 33, 29, 2, 96)):
        q, k, v = tensors(shape, dtype, "cuda")
        for mask in (None, mask_of(shape).cuda()):
            reference = math(q.double(), k.double(), v.double(), mask)
            assert distance(KERNELS[name](q, k, v, mask), reference) <= tolerance, (shape, mask is None)
        if KERNELS[name] not in WITH_LSE:
            continue
        blind = mask_of(shape).cuda()
        blind[-1] = False
        for mask in (None, mask_of(shape).cuda(), blind):
            out, lse = WITH_LSE[KERNELS[name]](q, k, v, mask)
            expected, expected_lse = math_with_lse(q.double(), k.double(), v.double(), mask)
            assert distance(out, expected) <= tolerance, (shape, mask)
            assert torch.equal(lse.isneginf(), expected_lse.isneginf())
            finite = ~expected_lse.isneginf()
            if finite.any():
                assert distance(lse[finite], expected_lse[finite]) <= tolerance
