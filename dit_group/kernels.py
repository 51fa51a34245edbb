"""Attention kernels: what computes softmax(q k^T) v, apart from how q, k and v got there.

Every kernel has the same shapes: q [B, S_q, N, D], k and v [B, S, N, D], and `key_mask` bool [B, S], False for keys
that nobody may see, or None where all are visible; the result is [B, S_q, N, D], contiguous, in q's dtype. Sizes may
be zero. The forms with log-sum-exp give also `lse` [B, N, S_q], float32 (float64 where q is, and for `math`): the
natural logarithm of the sum of exp(scores), minus infinity for a query that sees no key, whose output is then zero.
Two such results over different keys merge exactly (see `merge_partial`).
"""

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
KernelWithLse = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


# -- torch's own kernels


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """torch's scaled dot product attention, whichever backend it picks."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).contiguous()


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """torch's flash backend. On CUDA it knows no masks: hidden keys are taken away first, sample by sample."""
    if key_mask is not None and q.device.type == "cuda":
        return _without_hidden_keys(sdpa_flash, q, k, v, key_mask)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, key_mask)


def sdpa_efficient(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """torch's memory-efficient backend (CUDA)."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return sdpa(q, k, v, key_mask)


def sdpa_math(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """torch's plain formula in the inputs' dtype: any device, quadratic in memory."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(q, k, v, key_mask)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """cuDNN's kernel through torch (CUDA)."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, key_mask)


def math(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """The textbook formula in float64, for reference: slow, and quadratic in memory."""
    q64, k64, v64 = (x.to(torch.float64).transpose(1, 2) for x in (q, k, v))  # [B, N, S, D]
    scores = q64 @ k64.transpose(-1, -2) / q.shape[-1] ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return (scores.softmax(dim=-1) @ v64).transpose(1, 2).to(q.dtype).contiguous()


# -- kernels of other packages, imported where they run


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """FlashAttention-2 of the `flash_attn` package, bfloat16 or float16. Source: arXiv 2307.08691."""
    if key_mask is not None:
        return _without_hidden_keys(flash_attention_2, q, k, v, key_mask)
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func

    return flash_attn_func(q, k, v) if q.numel() and k.shape[1] else torch.zeros_like(q)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """FlashAttention-3 for Hopper GPUs, bfloat16 or float16. Source: arXiv 2407.08608."""
    if key_mask is not None:
        return _without_hidden_keys(flash_attention_3, q, k, v, key_mask)
    flash_attn_func = importlib.import_module("flash_attn_interface").flash_attn_func

    if not q.numel() or not k.shape[1]:
        return torch.zeros_like(q)
    found = flash_attn_func(q, k, v)
    return found[0] if isinstance(found, tuple) else found  # releases before 2025-09 return lse as well


def sage(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """SageAttention: q and k in 8 bits, so not exact. Source: arXiv 2410.02367, 2411.10958."""
    if key_mask is not None:
        return _without_hidden_keys(sage, q, k, v, key_mask)
    sageattn = importlib.import_module("sageattention").sageattn

    return sageattn(q, k, v, tensor_layout="NHD") if q.numel() and k.shape[1] else torch.zeros_like(q)


def _without_hidden_keys(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """A kernel that knows no masks, over the visible keys of each sample; reading the mask waits for the device."""
    return torch.cat(
        [
            kernel(q[i : i + 1], k[i : i + 1, visible], v[i : i + 1, visible], None)
            for i, visible in enumerate(key_mask.unbind(0))
        ]
    )


# -- with log-sum-exp


def sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `sdpa`: on the CPU its flash kernel, on CUDA flash where it can (16 bit, no mask), else memory-efficient."""
    if not q.numel() or not k.shape[1]:
        return _nothing(q)
    if q.device.type == "cpu":
        return _flash_cpu(q, k, v, key_mask)
    if q.device.type == "cuda" and q.dtype != torch.float64:
        if key_mask is None and q.dtype != torch.float32:
            return _flash_cuda(q, k, v)
        return sdpa_efficient_with_lse(q, k, v, key_mask)
    return math_with_lse(q, k, v, key_mask)


def sdpa_flash_with_lse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `sdpa_flash`."""
    if not q.numel() or not k.shape[1]:
        return _nothing(q)
    if q.device.type == "cpu":
        return _flash_cpu(q, k, v, key_mask)
    if key_mask is not None:
        return _without_hidden_keys_with_lse(sdpa_flash_with_lse, q, k, v, key_mask)
    return _flash_cuda(q, k, v)


def sdpa_efficient_with_lse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `sdpa_efficient`."""
    if not q.numel() or not k.shape[1]:
        return _nothing(q)
    B, S_q, N, D = q.shape
    bias = None
    if key_mask is not None:
        S = k.shape[1]
        whole = q.new_zeros((B, 1, 1, S + -S % 16))  # the kernel reads rows that begin on aligned addresses
        bias = whole[..., :S].masked_fill_(~key_mask[:, None, None, :], float("-inf")).expand(B, N, S_q, S)
    padded = (F.pad(x, (0, -D % 8)).transpose(1, 2) for x in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_efficient_attention(*padded, bias, True, scale=D**-0.5)
    out, lse = found[0][..., :D], found[1][:, :, :S_q]  # lse comes in whole blocks of queries
    return _blind_to_zero(out.transpose(1, 2), lse, key_mask)


def math_with_lse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `math`, lse in float64."""
    if not q.numel() or not k.shape[1]:
        return _nothing(q)
    q64, k64, v64 = (x.to(torch.float64).transpose(1, 2) for x in (q, k, v))  # [B, N, S, D]
    scores = q64 @ k64.transpose(-1, -2) / q.shape[-1] ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    out = (scores.softmax(dim=-1) @ v64).transpose(1, 2).to(q.dtype)
    return _blind_to_zero(out, scores.logsumexp(dim=-1), key_mask)


def flash_attention_2_with_lse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `flash_attention_2`."""
    if key_mask is not None:
        return _without_hidden_keys_with_lse(flash_attention_2_with_lse, q, k, v, key_mask)
    if not q.numel() or not k.shape[1]:
        return _nothing(q)
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func

    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


def flash_attention_3_with_lse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `flash_attention_3`."""
    if key_mask is not None:
        return _without_hidden_keys_with_lse(flash_attention_3_with_lse, q, k, v, key_mask)
    if not q.numel() or not k.shape[1]:
        return _nothing(q)
    flash_attn_func = importlib.import_module("flash_attn_interface").flash_attn_func

    asked = "return_attn_probs" in inspect.signature(flash_attn_func).parameters  # before, lse came unasked
    out, lse = flash_attn_func(q, k, v, return_attn_probs=True) if asked else flash_attn_func(q, k, v)
    return out, lse


def sage_with_lse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `sage`."""
    if key_mask is not None:
        return _without_hidden_keys_with_lse(sage_with_lse, q, k, v, key_mask)
    if not q.numel() or not k.shape[1]:
        return _nothing(q)
    sageattn = importlib.import_module("sageattention").sageattn

    out, lse = sageattn(q, k, v, tensor_layout="NHD", return_lse=True)
    return out, lse


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    bias = None
    if key_mask is not None:
        bias = q.new_zeros(key_mask.shape).masked_fill_(~key_mask, float("-inf"))[:, None, None, :]
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, attn_mask=bias)
    return _blind_to_zero(out.transpose(1, 2), lse, key_mask)


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    D = q.shape[3]
    padded = (F.pad(x, (0, -D % 8)).transpose(1, 2) for x in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_flash_attention(*padded, scale=D**-0.5)
    return found[0][..., :D].transpose(1, 2).contiguous(), found[1][:, :, : q.shape[1]]


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """No query, or no key: zeros that weigh nothing in a merge."""
    B, S_q, N, D = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros_like(q), q.new_full((B, N, S_q), float("-inf"), dtype=dtype)


def _blind_to_zero(out: Tensor, lse: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a sample gets that sees none of the keys: kernels give it lse 0, NaN or the mean of v, all of them wrong."""
    if key_mask is None:
        return out.contiguous(), lse
    blind = ~key_mask.any(dim=1)
    out = out.masked_fill(blind[:, None, None, None], 0.0)
    return out.contiguous(), lse.masked_fill(blind[:, None, None], float("-inf"))


def _without_hidden_keys_with_lse(
    kernel: KernelWithLse, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor
) -> tuple[Tensor, Tensor]:
    parts = [
        kernel(q[i : i + 1], k[i : i + 1, visible], v[i : i + 1, visible], None)
        for i, visible in enumerate(key_mask.unbind(0))
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def merge_partial(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys from that over each.

    Args:
        out, other: [B, S_q, N, D], float32 or float64.
        lse, other_lse: [B, N, S_q]; minus infinity where a set has no visible key (its `out` must then be finite).
    Source: online softmax (arXiv 1805.02867), as blockwise and ring attention use it (arXiv 2310.01889).
    """
    lead = torch.where(other_lse.isneginf(), other_lse, other_lse - lse)  # both empty: -inf, not NaN
    weight = lead.sigmoid().transpose(1, 2).unsqueeze(3).to(out.dtype)  # [B, S_q, N, 1]
    return torch.lerp(out, other.to(out.dtype), weight), torch.logaddexp(lse, other_lse)


# -- the tables


@dataclass(frozen=True)
class Need:
    """What a kernel needs: a CUDA device of some compute capability, 16 bit numbers, a package and how to get it."""

    capability: tuple[int, int]
    half: bool = True
    package: str | None = None
    how: str = ""


KERNELS: dict[str, Kernel] = {
    "sdpa": sdpa,
    "sdpa-flash": sdpa_flash,
    "sdpa-efficient": sdpa_efficient,
    "sdpa-math": sdpa_math,
    "sdpa-cudnn": sdpa_cudnn,
    "flash-attention-2": flash_attention_2,
    "flash-attention-3": flash_attention_3,
    "sage": sage,
    "math": math,
}

WITH_LSE: dict[Kernel, KernelWithLse] = {
    sdpa: sdpa_with_lse,
    sdpa_flash: sdpa_flash_with_lse,
    sdpa_efficient: sdpa_efficient_with_lse,
    flash_attention_2: flash_attention_2_with_lse,
    flash_attention_3: flash_attention_3_with_lse,
    sage: sage_with_lse,
    math: math_with_lse,
}

NEEDS: dict[str, Need] = {
    "sdpa-flash": Need(capability=(8, 0)),
    "sdpa-efficient": Need(capability=(5, 0), half=False),
    "sdpa-cudnn": Need(capability=(8, 0)),
    "flash-attention-2": Need(
        capability=(8, 0), package="flash_attn", how="pip install flash-attn --no-build-isolation"
    ),
    "flash-attention-3": Need(
        capability=(9, 0),
        package="flash_attn_interface",
        how="build the folder hopper/ of github.com/Dao-AILab/flash-attention with python setup.py install",
    ),
    "sage": Need(
        capability=(8, 0), package="sageattention", how="pip install git+https://github.com/thu-ml/SageAttention"
    ),
}


def check_kernel(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    with_lse: bool = False,
    look_at_device: bool = True,
) -> None:
    """Refuse a kernel that cannot run on this device, before any weight is loaded.

    Args:
        dtype: of the activations.
        with_lse: whether the strategy merges partial results (ring, usp).
        look_at_device: whether to ask a CUDA device for its compute capability, which takes memory on it; a process
            that only starts ranks leaves that to them.
    Raises:
        ValueError: unknown name, no such package, or an unsuitable device; says how to get it and what comes nearest.
    """
    path = f"model.attention_kernel={name!r}"
    if name not in KERNELS:
        near = difflib.get_close_matches(name, KERNELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"{path} must be one of {', '.join(map(repr, KERNELS))}; nearest is {near!r}")
    if with_lse and KERNELS[name] not in WITH_LSE:
        raise ValueError(
            f"{path} gives no log-sum-exp, which attention.strategy='ring' and 'usp' need; nearest is 'sdpa'"
        )
    if name not in NEEDS or (name == "sdpa-flash" and device.type == "cpu"):  # torch's flash kernel exists for both
        return
    need = NEEDS[name]
    if need.package is not None and importlib.util.find_spec(need.package) is None:
        raise ValueError(f"{path} needs the package {need.package}: {need.how}; nearest is 'sdpa'")
    if device.type != "cuda":
        raise ValueError(f"{path} needs a CUDA device, not {device.type}; nearest is 'sdpa'")
    if need.half and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{path} needs model.dtype='bfloat16' or 'float16', not {str(dtype)[6:]!r}; nearest is 'sdpa'")
    if not look_at_device:
        return
    found = torch.cuda.get_device_capability(device)
    if found < need.capability:
        needed, has = (".".join(map(str, pair)) for pair in (need.capability, found))
        raise ValueError(f"{path} needs compute capability {needed}, this device has {has}; nearest is 'sdpa'")


def kernel_with_lse(kernel: Kernel) -> KernelWithLse:
    """The form of a kernel that gives its log-sum-exp too.

    Raises:
        ValueError: it has none.
    """
    if kernel not in WITH_LSE:
        name = getattr(kernel, "__name__", repr(kernel))
        raise ValueError(f"kernel={name} gives no log-sum-exp, which ring attention needs; nearest is sdpa")
    return WITH_LSE[kernel]
