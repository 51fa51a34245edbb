"""Latents that are right in a member's own tokens only: nothing travels for them until they are finished."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_group.attention import SequenceParallel
from dit_group.denoise import Denoising, draw_noise
from dit_group.shards import gather_latents, patchify, unpatchify
from pipelines.checkpoint import Checkpoint
from pipelines.hunyuan_video_parts import HunyuanVideoDenoiser
from pipelines.open_sora_plan_family import OpenSoraPlan
from pipelines.open_sora_plan_parts import OpenSoraPlanDenoiser
from pipelines.skip_sparse_layout import held_patterns, held_tokens, sent_values
from tests.ranks import leave, run_ranks
from tests.test_sharded_dit import CASES, conditioning_of, make_denoiser, request_of
from tests.traffic import watched
from tools.tiny_open_sora_plan import make_open_sora_plan
from videopipe.config import load_config
from videopipe.exchange import gather_tokens
from videopipe.geometry import LatentGeometry, VideoSpec
from videopipe.partition import JointSequence, Partition, split_evenly
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime

FAMILIES = ("hunyuan-video", "open-sora-plan")
GUIDED = CASES["two branches of different length"]  # 30 video tokens, 11 and 4 of text
OSP_REQUEST = VideoRequest(
    id="clip",
    prompt="not encoded",
    spec=VideoSpec(height=48, width=80, num_frames=9, fps=18.0),  # 45 tokens
    num_inference_steps=3,
    guidance_scale=7.5,
    seed=5,
)


def osp_conditioning(rows: int = 2) -> dict[str, Tensor]:
    """Random embeddings of the tiny checkpoint's width, the first row with fewer tokens than the second."""
    generator = torch.Generator().manual_seed(7)
    embeds = torch.randn(2, 1, 9, 48, generator=generator)
    mask = torch.tensor([[[1] * 6 + [0] * 3], [[1] * 9]])
    return {"prompt_embeds": embeds[-rows:], "prompt_mask": mask[-rows:]}


def osp_denoiser(path: str, runtime: Runtime, **attention: object) -> OpenSoraPlanDenoiser:
    config = load_config(
        {
            "model": {"family": "open-sora-plan", "weights": path},
            "groups": {"dit_ranks": len(runtime.dit_ranks)},
            "attention": attention,
        }
    )
    denoiser = OpenSoraPlan().load_denoiser(Checkpoint(path), config, runtime)
    assert isinstance(denoiser, OpenSoraPlanDenoiser)
    return denoiser


def begin(denoiser: HunyuanVideoDenoiser | OpenSoraPlanDenoiser) -> Denoising:
    """The request with guidance of the denoiser's family."""
    if isinstance(denoiser, HunyuanVideoDenoiser):
        request, conditioning = request_of(GUIDED), conditioning_of(GUIDED)
    else:
        request, conditioning = OSP_REQUEST, osp_conditioning()
    return denoiser.begin(request, conditioning, draw_noise(denoiser.latent_shape(request), request.seed))


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    osp = make_open_sora_plan(tmp_path_factory.mktemp("osp") / "tiny", num_layers=4)
    return {"hunyuan-video": str(tiny_checkpoint), "open-sora-plan": str(osp)}


# -- how tokens lie in latents


@pytest.mark.parametrize("patch_t", [1, 2])
def test_patches_are_tokens_in_the_order_of_the_models(patch_t: int) -> None:
    geometry = LatentGeometry(channels=3, stride_t=4, stride_s=8, patch_t=patch_t, patch_s=2)
    latents = torch.randn(2, 3, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = patchify(latents, geometry)
    assert tokens.shape == (2, 4 // patch_t * 3 * 5, 3 * patch_t * 4)
    assert torch.equal(unpatchify(tokens, latents.shape, geometry), latents)
    embed = torch.nn.Conv3d(3, 7, (patch_t, 2, 2), stride=(patch_t, 2, 2), bias=False)
    by_model = embed(latents).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens @ embed.weight.flatten(1).T, by_model)
    assert not torch.allclose(tokens.flip(1) @ embed.weight.flatten(1).T, by_model)


def check_gathering(runtime: Runtime) -> None:
    geometry = LatentGeometry(channels=2, stride_t=4, stride_s=8, patch_t=1, patch_s=2)
    parallel = SequenceParallel(
        group=runtime.exchange_group, member=runtime.rank, members=runtime.world_size, num_heads=4
    )
    for shape in ((1, 2, 3, 6, 10), (2, 2, 1, 2, 4)):  # 45 tokens, and 2: fewer than members
        truth = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        tokens = patchify(truth, geometry)
        layout = parallel.lay_out(tokens.shape[1], 0)
        mine = torch.full_like(tokens, float("nan"))
        mine[:, layout.sequence.video_of(runtime.rank)] = tokens[:, layout.sequence.video_of(runtime.rank)]
        assert torch.equal(gather_latents(unpatchify(mine, shape, geometry), layout, geometry), truth)
    leave(runtime)


def test_latents_are_gathered_from_own_tokens_alone() -> None:
    run_ranks(check_gathering, 4)


# -- nothing travels between attention layers


def attention_bytes(runtime: Runtime, video: int, text: int, head_dim: int) -> int:
    """What this rank sends in one layer of four heads."""
    sequence = JointSequence.even(video, text, runtime.world_size)
    heads = Partition(sequence.counts, split_evenly(4, runtime.world_size))
    into = heads.to_heads_bytes(runtime.rank, 1, head_dim, 4)
    return 3 * into + heads.to_tokens_bytes(runtime.rank, 1, head_dim, 4)


def blocks_bytes(denoiser: OpenSoraPlanDenoiser, ranks: int, member: int) -> tuple[int, int]:
    """What a member sends in all blocks for one row, and to bring its prediction back to where it began."""
    config, patterns = denoiser.transformer.config, [block.sparse for block in denoiser.transformer.blocks()]
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    blocks, both = (
        4 * sent_values(patterns, 45, ranks=ranks, member=member, heads=heads, head_dim=head_dim, out_values=values)
        for values in (0, 8 * 4)
    )
    return blocks, both - blocks


@contextmanager
def gathering_every_step(denoiser: HunyuanVideoDenoiser | OpenSoraPlanDenoiser) -> Iterator[None]:
    """The prediction is made whole by an all-gather."""
    hooks, parallel = denoiser.transformer.proj_out._forward_hooks, denoiser._parallel
    assert parallel is not None
    placing = dict(hooks)
    hooks.clear()

    def gather(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        layout = parallel.layout  # as the tokens lie behind the last block
        whole = gather_tokens(output, layout.sequence.video_counts, parallel.group, parallel.member)
        return layout.in_sequence(whole)

    denoiser.transformer.proj_out.register_forward_hook(gather)
    yield
    hooks.clear()
    hooks.update(placing)


def check_steps(runtime: Runtime, checkpoints: dict[str, str]) -> None:
    members, me = runtime.world_size, runtime.rank
    for family in FAMILIES:
        denoiser: HunyuanVideoDenoiser | OpenSoraPlanDenoiser
        if family == "hunyuan-video":
            denoiser = make_denoiser(checkpoints[family], runtime)
            config = denoiser.transformer.config
            layers, video, patch = config.num_layers + config.num_single_layers, 30, 16 * 4
            attention = layers * sum(attention_bytes(runtime, 30, n, config.attention_head_dim) for n in (11, 4))
            back = 0
        else:
            denoiser = osp_denoiser(checkpoints[family], runtime)
            video, patch = 45, 8 * 4
            attention, back = (2 * size for size in blocks_bytes(denoiser, members, me))

        run = begin(denoiser)
        for step in range(run.num_steps):
            with watched() as traffic:
                run.step(step)
            assert traffic.sent() == attention + back, (family, traffic)
            assert traffic.calls == []
        with watched() as traffic:
            latents = run.latents()
        assert denoiser._parallel is not None
        layout = denoiser._parallel.layout
        gathered = layout.sequence.video_counts[me] * patch * 4 * (members - 1)
        assert traffic.exchanges == [(runtime.dit_ranks, gathered)] and traffic.calls == [], traffic

        twin = begin(denoiser)
        with gathering_every_step(denoiser), watched() as traffic:
            for step in range(twin.num_steps):
                twin.step(step)
        assert torch.equal(twin._latents, latents), "the same bits as with an all-gather in every step"
        ended = layout.sequence.video_counts[me]
        if isinstance(denoiser, OpenSoraPlanDenoiser):  # a member may hold fewer or more tokens than it began with
            patterns = held_patterns([block.sparse for block in denoiser.transformer.blocks()])
            ended = held_tokens(patterns[-1], video, members).totals[me]
        everywhere = 2 * ended * patch * 4 * (members - 1)  # of two evaluations, or two rows
        assert traffic.sent() == (attention + everywhere) * twin.num_steps and everywhere > back

        right = (patchify(run._latents, denoiser._geometry) == patchify(latents, denoiser._geometry)).all(2)[0]
        mine = torch.zeros(video, dtype=torch.bool)
        mine[layout.own] = True
        assert torch.equal(right, mine), "a member's own tokens are right, and no others"
        assert bool(run._latents.isfinite().all()), "which stay finite"
    leave(runtime)


def test_steps_send_nothing_outside_attention_and_a_request_gathers_once(checkpoints: dict[str, str]) -> None:
    run_ranks(check_steps, 4, checkpoints)
