"""Through xfuser's own exchange (yunchang) attention equals one process; what it cannot divide is refused."""

import importlib.util
from itertools import product

import pytest
import torch

from dit_group.attention import SequenceParallel
from dit_group.kernels import sdpa
from dit_group.xfuser import Xfuser, check_xfuser
from pipelines.explain import explain_config
from tests.ranks import leave, run_ranks
from videopipe.config import ConfigError, load_config
from videopipe.runtime import Runtime

installed = importlib.util.find_spec("yunchang") is not None
needs_yunchang = pytest.mark.skipif(not installed, reason="needs the package yunchang")


def check_equal(runtime: Runtime) -> int:
    member, members, checked = runtime.rank, runtime.world_size, 0
    for batch, heads, masked in product((1, 2), (12, 24), (False, True)):
        parallel = SequenceParallel(
            group=runtime.exchange_group, member=member, members=members, num_heads=heads, strategy="xfuser"
        )
        valid = torch.arange(12)[None].expand(batch, -1) < 7
        layout = parallel.lay_out(36, 12, valid if masked else None)
        parallel.use(layout)
        sequence = layout.sequence
        generator = torch.Generator().manual_seed(heads)
        whole = [torch.randn((batch, 48, heads, 8), generator=generator)[:, sequence.order()] for _ in range(3)]
        mask = torch.cat([torch.ones(batch, 36, dtype=torch.bool), valid], dim=1)[:, sequence.order()]
        own = slice(sum(sequence.counts[:member]), sum(sequence.counts[: member + 1]))
        ours = parallel.attention(*(x[:, own] for x in whole))
        assert torch.equal(ours, sdpa(*whole, mask if masked else None)[:, own]), (batch, heads, masked)
        assert not torch.equal(ours, sdpa(*whole, None if masked else mask)[:, own])
        checked += 1
    leave(runtime)
    return checked


@needs_yunchang
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_attention_through_xfusers_exchange_is_bit_equal_to_one_process(world_size: int) -> None:
    assert set(run_ranks(check_equal, world_size)) == {8}


@needs_yunchang
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_counts": (4, 3)}, "7 tokens do not divide by 2 members.*nearest is 6"),
        ({"num_heads": 5}, "groups.dit_ranks=2 must divide 5 heads.*nearest is 1"),
        ({"heads_per_chunk": 2}, "heads_per_chunk=2 divides heads.*nearest is None"),
        ({"balance": "rows"}, "balance='rows' divides heads.*nearest is 'heads'"),
    ],
)
def test_sizes_that_it_cannot_divide_are_refused(arguments: dict[str, object], message: str) -> None:
    sizes: dict[str, object] = {"token_counts": (4, 4), "num_heads": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        Xfuser(group=None, member=0, kernel=sdpa, key_mask=None, **sizes)  # type: ignore[arg-type]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package yunchang \(pip install yunchang"):
        check_xfuser(24, 2)


def test_configurations_that_mean_nothing_to_it_are_refused() -> None:
    for key, value in (("heads_per_chunk", "2"), ("balance", "rows"), ("ulysses_degree", "2")):
        with pytest.raises(ConfigError, match=f"attention.{key}=.* means nothing to attention.strategy='xfuser'"):
            load_config(None, ["attention.strategy=xfuser", f"attention.{key}={value}"])


def test_explain_counts_the_bytes_of_plain_ulysses() -> None:
    common = ["groups.dit_ranks=6", "model.dtype=bfloat16", "runtime.device=cpu"]
    ours, plain = (
        explain_config(load_config(None, [*common, f"attention.strategy={name}"])) for name in ("xfuser", "ulysses")
    )
    assert [r.exchange_bytes_per_layer for r in ours.ranks] == [r.exchange_bytes_per_layer for r in plain.ranks]
