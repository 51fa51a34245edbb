"""Ranks that hold whole groups give the blocks' exact outputs, with one exchange of the residual stream per block."""

import pytest
import torch
from torch import Tensor

from pipelines.models import skip_sparse_layout as layout
from pipelines.models.open_sora_plan import (
    DENSE,
    MASKED,
    OpenSoraPlanTransformer3DModel,
    SelfAttnProcessor,
    SkipSparse,
    skip_sparse_attention,
)
from pipelines.models.skip_sparse_layout import Reshard, held_tokens, reshard

SINGLE, GROUP = SkipSparse(kind="single", k=4), SkipSparse(kind="group", k=4)


def exchange(shards: list[Tensor], plans: list[Reshard]) -> list[Tensor]:
    """What all_to_all_single does between the plans' two indexings, in one process."""
    pieces = [
        shard[:, plan.send_order].split(plan.send_counts, dim=1) for shard, plan in zip(shards, plans, strict=True)
    ]
    received = []
    for r, plan in enumerate(plans):
        parts = [pieces[source][r] for source in range(len(plans))]
        assert tuple(part.shape[1] for part in parts) == plan.receive_counts
        received.append(torch.cat(parts, dim=1)[:, plan.receive_order])
    return received


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("tokens", [16, 35, 105])
def test_every_token_is_held_once_and_finds_its_new_rank(ranks: int, tokens: int) -> None:
    x = torch.arange(2.0 * tokens * 3).view(2, tokens, 3)
    held = {p.kind: held_tokens(p, tokens, ranks) for p in (DENSE, SINGLE, GROUP)}
    for name, tokens_by_rank in held.items():
        assert torch.equal(torch.cat(tokens_by_rank).sort().values, torch.arange(tokens)), name
    shards = [x[:, ids] for ids in held["dense"]]
    before = held["dense"]
    for kind in ("single", "group", "single", "dense"):
        after = held[kind]
        shards = exchange(shards, [reshard(before, after, r) for r in range(ranks)])
        assert all(torch.equal(shard, x[:, ids]) for shard, ids in zip(shards, after, strict=True))
        before = after


def test_ranks_hold_whole_groups_or_share_one() -> None:
    for pattern in (SINGLE, GROUP):
        for ranks in (1, 2, 4):
            for r, ids in enumerate(held_tokens(pattern, 64, ranks)):
                assert len(layout.group_of(ids, pattern).unique()) == 4 // ranks
                assert list(layout.peers(pattern, ranks, r)) == [r]
        for r, ids in enumerate(held_tokens(pattern, 64, 8)):
            assert layout.group_of(ids, pattern).unique().tolist() == [r // 2]
            assert list(layout.peers(pattern, 8, r)) == [r // 2 * 2, r // 2 * 2 + 1]
    assert list(layout.peers(DENSE, 8, 3)) == list(range(8))


@pytest.mark.parametrize("ranks", [3, 6, 7])
def test_ranks_that_do_not_divide_the_groups(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{ranks} ranks cannot share 4 groups evenly, nearest is [24]"):
        held_tokens(SINGLE, 64, ranks)


@pytest.mark.parametrize("sparse", [SINGLE, GROUP], ids=lambda s: s.kind)
@pytest.mark.parametrize("tokens", [3, 32, 35])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_held_groups_attend_as_in_the_whole_sequence(sparse: SkipSparse, tokens: int, masked: bool, ranks: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, tokens, 3, 6, generator=g) for _ in range(3))
    bias = (torch.rand(2, tokens, generator=g) > 0.6) * MASKED if masked else None
    whole = skip_sparse_attention(q, k, v, sparse=sparse, key_bias=bias)
    for held in held_tokens(sparse, tokens, ranks):
        shards = (x[:, held] for x in (q, k, v))
        out = layout.attend_held_groups(*shards, sparse=sparse, held=held, tokens=tokens, key_bias=bias)
        assert (out - whole[:, held]).abs().max() < 1e-5 if len(held) else True


@pytest.mark.parametrize("broken", [False, True])
def test_blocks_on_four_ranks_exchange_only_the_residual_stream(broken: bool) -> None:
    """Sparse blocks, rank by rank, against the whole model; the twin attends in the other pattern's groups."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 8}
    model = OpenSoraPlanTransformer3DModel(num_layers=6, **options).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "to_q" in name or "to_k" in name:
            parameter.mul_(8)  # attention that sees a difference
    seen: dict[int, Tensor] = {}
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args))
    final: list[Tensor] = []
    model.transformer_blocks[5].register_forward_hook(lambda _, __, out: final.append(out))
    model(torch.randn(2, 8, 3, 10, 14), torch.tensor(500.0), torch.randn(2, 1, 5, 8))

    tokens, ranks = 105, 4
    before = held_tokens(DENSE, tokens, ranks)
    shards = [seen[2][0][:, ids] for ids in before]
    for i in range(2, 6):
        block = model.transformer_blocks[i]
        pattern = block.sparse
        after = held_tokens(pattern, tokens, ranks)
        shards = exchange(shards, [reshard(before, after, r) for r in range(ranks)])
        _, modulation, (cos, sin), text, *_ = seen[i]
        used = (GROUP if pattern == SINGLE else SINGLE) if broken else pattern
        results = []
        for ids, shard in zip(after, shards, strict=True):

            def attend(
                q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, key_bias: Tensor | None, ids: Tensor = ids
            ) -> Tensor:
                return layout.attend_held_groups(q, k, v, sparse=sparse, held=ids, tokens=tokens, key_bias=key_bias)

            block.attn1.set_processor(SelfAttnProcessor(used, attend))
            results.append(block.forward(shard, modulation, (cos[ids], sin[ids]), text))
        shards, before = results, after
    whole = torch.empty_like(final[0])
    for ids, shard in zip(before, shards, strict=True):
        whole[:, ids] = shard
    error = float((whole - final[0]).abs().max())
    assert error > 1e-2 if broken else error < 1e-5
