"""Through xfuser's own exchange (yunchang) attention equals one process; what it cannot divide is refused."""

import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch

from dit_group.attention import SequenceParallel
from dit_group.kernels import sdpa
from dit_group.xfuser import Xfuser, check_xfuser, check_xfuser_tokens
from pipelines import HunyuanVideoPipeline, cli
from pipelines.explain import explain_config
from pipelines.launch import LocalLauncher
from pipelines.pipeline import VideoPipeline
from tests.ranks import leave, run_ranks
from videopipe.config import ConfigError, load_config
from videopipe.geometry import VideoSpec
from videopipe.partition import JointSequence
from videopipe.records import VideoRequest
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


def evenly_shared(num_video: int, num_text: int, members: int) -> bool:
    """As ranks lay a sequence out: each has a text token at least."""
    return len(set(JointSequence.even(num_video, max(num_text, members), members).counts)) == 1


def test_text_whose_tokens_do_not_divide_is_refused_with_one_that_does() -> None:
    for num_video, num_text, members in product(range(60, 72), range(1, 16), range(2, 9)):
        if evenly_shared(num_video, num_text, members):
            check_xfuser_tokens(num_video, num_text, members, "max_sequence_length")
            continue
        with pytest.raises(ValueError, match=f"^max_sequence_length={num_text}: .* nearest is ") as refused:
            check_xfuser_tokens(num_video, num_text, members, "max_sequence_length")
        near = int(str(refused.value).rpartition(" ")[2])
        assert evenly_shared(num_video, near, members) and near >= members


@needs_yunchang
def test_a_clip_through_the_engine_and_one_that_is_refused_before_anything_is_loaded(
    tiny_checkpoint: Path, launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = []
    size = {"height": 80, "width": 48, "num_inference_steps": 2, "seed": 3, "output_type": "latent"}
    for ranks in (1, 2):
        overrides = ["runtime.threads_per_rank=1", "attention.strategy=xfuser", "attention.text=padded"]
        with HunyuanVideoPipeline.from_pretrained(
            tiny_checkpoint, dit_ranks=ranks, vae_ranks=0, overrides=overrides, launcher=launcher
        ) as pipe:
            clips.append(pipe("a red fox", num_frames=9, max_sequence_length=33, **size).frames)  # 45 + 33
            if ranks == 1:
                continue
            with pytest.raises(ValueError, match=r"^max_sequence_length=256: .*nearest is 255"):
                pipe("a red fox", num_frames=9, **size)
            request = VideoRequest(id="a", prompt="a fox", spec=VideoSpec(height=80, width=48, num_frames=9))
            with pytest.raises(ValueError, match=r"^requests\[0\].max_sequence_length=256: .*nearest is 255"):
                pipe.render([request])
            length = torch.zeros(1, 32, 1)
            given = {"prompt_embeds": length, "pooled_prompt_embeds": length, "prompt_attention_mask": length}
            with pytest.raises(ValueError, match=r"^prompt_embeds.shape\[1\]=32: .*nearest is 31"):
                pipe(num_frames=9, max_sequence_length=33, **given, **size)
    assert float((clips[1] - clips[0]).abs().max() / clips[0].abs().max()) <= 1e-5
    monkeypatch.setattr(VideoPipeline, "start", None)  # nobody may start a rank
    size_of = ["--height=80", "--width=48", "--num-frames=9"]
    args = ["render", "a red fox", f"--model={tiny_checkpoint}", *size_of, "--set", "attention.strategy=xfuser"]
    assert cli.run([*args, "--set", "groups.dit_ranks=2"]) == 2
    assert "max_sequence_length=256: " in capsys.readouterr().err


def test_text_of_unknown_length_is_refused() -> None:
    strategy = ["attention.strategy=xfuser", "groups.dit_ranks=2"]
    assert not load_config(None, strategy).text_trimmed
    with pytest.raises(ConfigError, match=r"attention.text='trimmed' .*nearest is 'padded'"):
        load_config(None, [*strategy, "attention.text=trimmed"])


def test_configurations_that_mean_nothing_to_it_are_refused() -> None:
    for key, value in (("heads_per_chunk", "2"), ("balance", "rows"), ("ulysses_degree", "2")):
        with pytest.raises(ConfigError, match=f"attention.{key}=.* means nothing to attention.strategy='xfuser'"):
            load_config(None, ["attention.strategy=xfuser", f"attention.{key}={value}"])


def test_explain_counts_the_bytes_of_plain_ulysses() -> None:
    common = ["groups.dit_ranks=8", "model.dtype=bfloat16", "runtime.device=cpu"]
    ours, plain = (
        explain_config(load_config(None, [*common, f"attention.strategy={name}"])) for name in ("xfuser", "ulysses")
    )
    assert [r.exchange_bytes_per_layer for r in ours.ranks] == [r.exchange_bytes_per_layer for r in plain.ranks]
