"""The plan of exact decode and encode: its bytes against tensors counted alive, its FLOPs against PyTorch's counter."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipelines import hunyuan_video_exact_plan
from pipelines.hunyuan_video_exact import exact_decode, exact_encode
from pipelines.hunyuan_video_exact_plan import ExactPlan, Level, decode_plans, plan_decode, plan_encode
from tools.count_ops import OpCounter
from vae_group.memory import UNUSABLE, bytes_needed
from vae_group.team import Team

RELEASED = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "mid_block_add_attention": True,
}
LATENTS_720P = (33, 90, 160)
CONSTANT = 2**18  # bytes for statistics and widened pieces, which do not grow with the clip beyond PIECE
LEVELS = [
    *(pytest.param(levels, marks=pytest.mark.slow) for levels in ((0, 0, 0, 0), (0, 0, 0, 1))),
    (0, 1, 2, 2),
    (0, 0, 1, 3),
]


def small_vae(dtype: torch.dtype) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 8, 16, 16), norm_num_groups=2, layers_per_block=2, latent_channels=4
    )
    return vae.eval().requires_grad_(False).to(dtype)


@pytest.fixture
def bfloat16() -> Iterator[None]:
    """What modules and tensors are made of; fake ones cannot be converted."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


class LargestKernel(TorchDispatchMode):
    """Notes the most bytes that a convolution or an attention reads (its weights aside) and writes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution" or "attention" in name:
            read = args[:1] if name == "convolution" else args[:3]
            written = result if name == "convolution" else result[0]
            self.bytes = max(self.bytes, sum(x.numel() * x.element_size() for x in (*read, written)))
        return result


def run(vae: AutoencoderKLHunyuanVideo, x: Tensor, plan: ExactPlan) -> None:
    if x.shape[1] == 3:
        exact_encode(vae, x, Team(), plan=plan)
    else:
        for part in exact_decode(vae, x, Team(), plan=plan):
            del part


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_peak_bytes_and_flops_are_as_counted(
    kind: str, levels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = kind == "decode"
    planned, shape = (plan_decode, (3, 8, 10)) if decode else (plan_encode, (9, 64, 80))
    order = [Level(level) for level in (levels if decode else (*levels[:0:-1], 0))]
    for dtype, slab_bytes in ((torch.float32, 2**18), (torch.bfloat16, 0)):
        monkeypatch.setattr(hunyuan_video_exact_plan, "SLAB_BYTES", (slab_bytes,))
        vae = small_vae(dtype)
        plan = planned(vae.config, shape, 1, dtype.itemsize, levels=order)
        x = torch.zeros(1, 4 if decode else 3, *shape, dtype=dtype)
        with OpCounter() as live:
            run(vae, x, plan)
        assert live.live == 0
        assert live.peak <= plan.peak_bytes <= 1.25 * live.peak + CONSTANT, (plan, live.peak)
        with LargestKernel() as largest:
            run(vae, x, plan)
        assert largest.bytes <= plan.at_work_bytes <= 1.1 * largest.bytes, (plan, largest.bytes)
    with FlopCounterMode(display=False) as counter:
        run(vae, x, plan)
    assert plan.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("latents", "levels"),
    [
        ((9, 30, 48), (0, 0, 0, 1)),
        (LATENTS_720P, (0, 0, 0, 0)),
        (LATENTS_720P, (0, 0, 0, 2)),
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_released_model_has_as_much_alive_as_planned(
    bfloat16: None, latents: tuple[int, int, int], levels: tuple[int, ...]
) -> None:
    with FakeTensorMode():
        vae = AutoencoderKLHunyuanVideo().eval().requires_grad_(False)
        plan = plan_decode(vae.config, latents, 1, 2, levels=[Level(level) for level in levels])
        x = torch.empty(1, 16, *latents)
        with OpCounter() as live:
            run(vae, x, plan)
    assert live.live == 0
    assert live.peak <= plan.peak_bytes <= 1.25 * live.peak, (plan, live.peak)
    assert latents != LATENTS_720P or plan.peak_bytes <= 1.02 * live.peak, "at one frame in a slab"


def test_720p_takes_a_quarter_of_the_room_on_four_ranks_and_fits_one_24_gb_card() -> None:
    fastest = {members: plan_decode(RELEASED, LATENTS_720P, members, 2) for members in (1, 2, 4, 8)}
    for plan in fastest.values():
        assert {stage.level for stage in plan.stages} == {Level.HOLD}
    assert 3.5 < fastest[1].peak_bytes / fastest[4].peak_bytes < 4
    assert fastest[8].peak_bytes < 24e9 < fastest[4].peak_bytes
    alone = plan_decode(RELEASED, LATENTS_720P, 1, 2, memory_bytes=20 * 2**30)
    assert alone.peak_bytes <= 20 * 2**30 and alone.stages[-1].level == Level.STREAM
    assert 3 < alone.flops / fastest[1].flops < 4
    weights, cuda = 246_478_803 * 2, torch.device("cuda")
    needs = [bytes_needed(p.peak_bytes, cuda, p.at_work_bytes) for p in decode_plans(RELEASED, LATENTS_720P, 1, 2)]
    assert min(needs) + weights < 24e9 * (1 - UNUSABLE) < max(needs), "with what kernels may take, and fragments"


def test_less_room_is_never_faster_and_always_kept_to() -> None:
    for planned, shape in ((plan_decode, LATENTS_720P), (plan_encode, (129, 720, 1280))):
        plans = [planned(RELEASED, shape, 2, 2, memory_bytes=room * 2**30) for room in (10, 20, 40, 80)]
        assert all(plan.peak_bytes <= room * 2**30 for plan, room in zip(plans, (10, 20, 40, 80), strict=True))
        flops = [plan.flops for plan in plans]
        assert flops == sorted(flops, reverse=True) and flops[0] > flops[-1]


def test_too_little_room_names_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"memory_bytes=1000 is too little to decode this clip.*nearest is (\d+)") as e:
        plan_decode(RELEASED, LATENTS_720P, 1, 2, memory_bytes=1000)
    least = int(str(e.value).rsplit(" ", 1)[1])
    assert plan_decode(RELEASED, LATENTS_720P, 1, 2, memory_bytes=least).peak_bytes == least
