"""The denoiser equals what the official code recorded, its sparse attention a naive one, its dense form diffusers'."""

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_allegro import AllegroTransformer3DModel
from torch import Tensor

from pipelines.models import open_sora_plan as osp
from pipelines.models.open_sora_plan import (
    OpenSoraPlanTransformer3DModel,
    from_groups,
    skip_sparse_attention,
    to_groups,
)
from pipelines.models.skip_sparse import DENSE, SkipSparse
from tests.osp_recorded import Recorded, dit_scale, draw, manifest

SINGLE = SkipSparse(kind="single", k=4)
GROUP = SkipSparse(kind="group", k=4)
CASES = ("video_pad", "image_tiny")
TINY = {
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "cross_attention_dim": 36,
    "caption_channels": 20,
    "num_layers": 4,
}


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded("dit_tiny_sparse")


@pytest.fixture
def model(recorded: Recorded) -> OpenSoraPlanTransformer3DModel:
    model = OpenSoraPlanTransformer3DModel(**recorded.config).eval().requires_grad_(False)
    model.load_state_dict(draw({k: v.shape for k, v in model.state_dict().items()}, recorded.seed, dit_scale))
    return model


def tiny(seed: int = 0, **options: object) -> OpenSoraPlanTransformer3DModel:
    model = OpenSoraPlanTransformer3DModel(**(TINY | options)).eval().requires_grad_(False)
    model.load_state_dict(draw({k: v.shape for k, v in model.state_dict().items()}, seed, dit_scale))
    return model


def inputs(
    seed: int = 0, batch: int = 2, latents: tuple[int, ...] = (8, 3, 6, 10), text: int = 9, width: int = 20
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, *latents, generator=g),
        "timestep": torch.tensor([999.0, 123.0, 9.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, 1, text, width, generator=g),
        "attention_mask": torch.ones(batch, *latents[1:]),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor([text, 4, 1])[:batch, None])[:, None].long(),
    }


def attend_by(model: OpenSoraPlanTransformer3DModel, attend: osp.Attend) -> None:
    for block in model.blocks():
        block.attn1.set_processor(osp.SelfAttnProcessor(block.sparse, attend))


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value: the recordings were made on another processor."""
    return worst(a, b) / float(b.abs().max())


# --- the recorded outputs


@pytest.mark.parametrize("case", CASES)
def test_recorded_outputs(recorded: Recorded, model: OpenSoraPlanTransformer3DModel, case: str) -> None:
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    sample = model(**recorded.part(f"{case}/inputs")).sample
    outputs = recorded.part(f"{case}/outputs")
    assert relative(sample, outputs.pop("sample")) < 1e-5
    for name, value in outputs.items():
        assert relative(seen[name.removeprefix("trace/")], value.transpose(0, 1)) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_text_projected_once_serves_every_step(
    recorded: Recorded, model: OpenSoraPlanTransformer3DModel, case: str
) -> None:
    given = recorded.part(f"{case}/inputs")
    text = model.encode_text(given["encoder_hidden_states"], given["encoder_attention_mask"])
    for t in (given["timestep"], given["timestep"] * 0 + 7):
        direct = model(**(given | {"timestep": t})).sample
        assert torch.equal(model(given["hidden_states"], t, text=text).sample, direct)
    one = model(given["hidden_states"][1:], given["timestep"][1:], text=text.select(slice(1, 2))).sample
    assert worst(one, recorded.part(f"{case}/outputs")["sample"][1:]) < 1e-5


def swapped(index: int, sparse1d: bool, sparse_n: int) -> SkipSparse:
    return osp.block_sparsity(index ^ 1, sparse1d, sparse_n)


@pytest.mark.parametrize(
    ("broken", "at_least"),
    [(lambda *_: DENSE, 0.5), (swapped, 0.5), (lambda i, *_: SINGLE if i % 2 == 0 else GROUP, 0.1)],
    ids=["dense instead of sparse", "single and group swapped", "first blocks sparse too"],
)
def test_wrong_sparsity_is_noticed(
    recorded: Recorded, model: OpenSoraPlanTransformer3DModel, broken: Callable[..., SkipSparse], at_least: float
) -> None:
    for i, block in enumerate(model.transformer_blocks):
        block.attn1.set_processor(osp.SelfAttnProcessor(broken(i, True, 4), skip_sparse_attention))
    sample = model(**recorded.part("video_pad/inputs")).sample
    assert worst(sample, recorded.tensors["video_pad/outputs/sample"]) > at_least


def test_forgotten_padding_mask_is_noticed(recorded: Recorded, model: OpenSoraPlanTransformer3DModel) -> None:
    def forgetful(q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, key_bias: Tensor | None) -> Tensor:
        q, k, v = (
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, sparse.padded(x.shape[1]) - x.shape[1])) for x in (q, k, v)
        )
        return skip_sparse_attention(q, k, v, sparse=sparse, key_bias=None)[:, :105]

    attend_by(model, forgetful)
    sample = model(**recorded.part("video_pad/inputs")).sample
    assert worst(sample, recorded.tensors["video_pad/outputs/sample"]) > 0.1


@pytest.mark.parametrize("change", ["text mask", "timestep", "rotation"])
def test_wrong_inputs_are_noticed(recorded: Recorded, model: OpenSoraPlanTransformer3DModel, change: str) -> None:
    given = recorded.part("video_pad/inputs")
    if change == "text mask":
        given["encoder_attention_mask"] = torch.ones_like(given["encoder_attention_mask"])
    elif change == "timestep":
        given["timestep"] = given["timestep"].bfloat16()  # rounds 999 to 1000
    else:
        model.rotary.register_forward_hook(lambda _, args, out: tuple(x.roll(8, dims=1) for x in out))
    sample = model(**given).sample
    assert worst(sample, recorded.tensors["video_pad/outputs/sample"]) > 1e-2


def test_half_precision_stays_near(recorded: Recorded, model: OpenSoraPlanTransformer3DModel) -> None:
    given = recorded.part("video_pad/inputs")
    for key in ("hidden_states", "encoder_hidden_states"):
        given[key] = given[key].bfloat16()
    sample = model.bfloat16()(**given).sample
    assert sample.dtype == torch.bfloat16
    error = worst(sample.float(), recorded.tensors["video_pad/outputs/sample"])
    assert error < 0.12  # the official code's own: 0.06
    given["timestep"] = given["timestep"].bfloat16()
    assert worst(model(**given).sample.float(), recorded.tensors["video_pad/outputs/sample"]) > 3 * error


# --- sparse attention against the definition


def naive(q: Tensor, k: Tensor, v: Tensor, sparse: SkipSparse, keep: Tensor) -> Tensor:
    """Each query by itself: the keys of its group, ignored ones at -10000, filled-up ones (zeros) at -9980."""
    B, S, N, D = q.shape
    filled = S if sparse.kind == "dense" else -(-S // 16) * 16
    group = {"dense": lambda n: 0, "single": lambda n: n % 4, "group": lambda n: n // 4 % 4}[sparse.kind]
    out = torch.zeros_like(q)
    for b in range(B):
        for n in range(S):
            members = [m for m in range(filled) if group(m) == group(n)]
            for h in range(N):
                keys = torch.stack([k[b, m, h] if m < S else torch.zeros(D) for m in members])
                values = torch.stack([v[b, m, h] if m < S else torch.zeros(D) for m in members])
                bias = torch.tensor([(0.0 if keep[b, m] else -10000.0) if m < S else -9980.0 for m in members])
                out[b, n, h] = torch.softmax(keys @ q[b, n, h] / math.sqrt(D) + bias, dim=0) @ values
    return out


@pytest.mark.parametrize("sparse", [DENSE, SINGLE, GROUP], ids=lambda s: s.kind)
@pytest.mark.parametrize("tokens", [1, 5, 16, 35])
@pytest.mark.parametrize("mask", ["none", "some", "whole groups"])
def test_sparse_attention_equals_its_definition(sparse: SkipSparse, tokens: int, mask: str) -> None:
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, tokens, 3, 6, generator=g) for _ in range(3))
    keep = torch.ones(2, tokens)
    if mask == "some":
        keep = (torch.rand(2, tokens, generator=g) > 0.4).float()
    elif mask == "whole groups":
        keep[0, 1::4] = 0
        keep[1] = 0
    bias = None if mask == "none" else (1 - keep) * osp.MASKED
    out = skip_sparse_attention(q, k, v, sparse=sparse, key_bias=bias)
    assert worst(out, naive(q, k, v, sparse, keep)) < 1e-5
    if mask == "some" and tokens > 5:
        assert worst(out, skip_sparse_attention(q, k, v, sparse=sparse, key_bias=None)) > 1e-2


@pytest.mark.parametrize("sparse", [DENSE, SINGLE, GROUP], ids=lambda s: s.kind)
@pytest.mark.parametrize("tokens", [1, 15, 16, 33])
def test_groups_round_trip(sparse: SkipSparse, tokens: int) -> None:
    x = torch.arange(2.0 * tokens * 3 * 2).view(2, tokens, 3, 2)
    groups = to_groups(x, sparse)
    assert groups.shape == (2 * sparse.groups, sparse.padded(tokens) // sparse.groups, 3, 2)
    assert torch.equal(from_groups(groups, sparse, tokens), x)


def test_which_blocks_are_sparse() -> None:
    kinds = [osp.block_sparsity(i, True, 4).kind for i in range(40)]
    assert [i for i, kind in enumerate(kinds) if kind == "dense"] == [0, 1, *range(30, 40)]
    assert all(kinds[i] == ("single" if i % 2 == 0 else "group") for i in range(2, 30))
    assert all(osp.block_sparsity(i, True, 1) == DENSE for i in range(32))


# --- masks, sizes, the seam


@pytest.mark.parametrize("latents", [(8, 1, 2, 2), (8, 1, 6, 4), (8, 2, 2, 6), (8, 5, 6, 10), (8, 4, 8, 8)])
@pytest.mark.parametrize("batch", [1, 3])
def test_masked_video_pixels_are_ignored(latents: tuple[int, ...], batch: int) -> None:
    model, given = tiny(), inputs(batch=batch, latents=latents)
    whole = model(**given).sample
    assert whole.shape == given["hidden_states"].shape
    assert torch.equal(model(**(given | {"attention_mask": None})).sample, whole)
    if latents[1] < 2:
        return
    given["attention_mask"][:, -1] = 0
    masked = model(**given).sample
    assert worst(masked, whole) > 1e-3
    given["hidden_states"][:, :, -1] = 5.0  # what is masked changes nothing elsewhere
    assert worst(model(**given).sample[:, :, :-1], masked[:, :, :-1]) < 1e-5


def test_a_token_is_kept_where_any_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 2, 4, 6)
    mask[0, 0, 1, 3] = mask[0, 1, 2, 4] = 1
    bias = osp.video_bias(mask, 2)
    assert bias is not None
    assert (bias == 0).flatten().nonzero().flatten().tolist() == [1, 11]
    assert osp.video_bias(torch.ones(1, 2, 4, 6, dtype=torch.bool), 2) is None


def test_masked_text_is_ignored() -> None:
    model, given = tiny(), inputs()
    sample = model(**given).sample
    given["encoder_hidden_states"][1, :, 4:] = 3.0
    assert worst(model(**given).sample, sample) < 1e-5
    given["encoder_hidden_states"][1, :, 3] = 3.0
    assert worst(model(**given).sample, sample) > 1e-3


def test_dense_form_equals_diffusers_allegro() -> None:
    """An independent implementation: the same keys, and the same outputs where nothing is sparse."""
    model, given = tiny(sparse_n=1), inputs()
    allegro = AllegroTransformer3DModel(
        in_channels=8, out_channels=8, attention_head_dim=12, num_attention_heads=3, cross_attention_dim=36,
        caption_channels=20, num_layers=4,
    ).eval()  # fmt: skip
    allegro.load_state_dict(model.state_dict())
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(5)).T
    positions = tuple(axis[None].long() for axis in grid)
    frequencies = 10000.0 ** (-torch.arange(0, 4, 2) / 4)
    tables = []
    for count in (3, 3, 5):
        angles = torch.outer(torch.arange(count).float(), frequencies).repeat(1, 2)
        tables.append((angles.cos(), angles.sin()))
    with torch.no_grad():
        theirs = allegro(
            hidden_states=given["hidden_states"],
            encoder_hidden_states=given["encoder_hidden_states"][:, 0],
            timestep=given["timestep"],
            attention_mask=given["attention_mask"],
            encoder_attention_mask=given["encoder_attention_mask"][:, 0],
            image_rotary_emb=(tables, positions),
        ).sample
    assert worst(model(**given).sample, theirs) < 1e-5
    assert worst(tiny(sparse_n=4)(**given).sample, theirs) > 1e-2


def test_interpolation_scales_divide_positions_of_their_own_axis() -> None:
    for axis, name in enumerate(("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")):
        model = tiny(**{name: 2.0})
        cos, _ = model.rotary(5, 5, 5)
        plain, _ = tiny().rotary(5, 5, 5)
        cos, plain = cos.view(5, 5, 5, 3, 4), plain.view(5, 5, 5, 3, 4)
        assert torch.allclose(cos.movedim(axis, 0)[2, ..., axis, :], plain.movedim(axis, 0)[1, ..., axis, :])
        others = [i for i in range(3) if i != axis]
        assert torch.equal(cos[..., others, :], plain[..., others, :])


def test_attention_can_be_computed_in_pieces_of_heads() -> None:
    model, given = tiny(), inputs()
    whole = model(**given).sample
    calls = []

    def by_head(q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, key_bias: Tensor | None) -> Tensor:
        calls.append(sparse.kind)
        heads = [
            skip_sparse_attention(q[:, :, [h]], k[:, :, [h]], v[:, :, [h]], sparse=sparse, key_bias=key_bias)
            for h in range(q.shape[2])
        ]
        return torch.cat(heads, dim=2)

    attend_by(model, by_head)
    assert worst(model(**given).sample, whole) < 1e-6
    assert calls == ["dense", "dense", "single", "group"]


@pytest.mark.parametrize("owned", [slice(0, 1), slice(1, 20), slice(20, 45)])
def test_all_but_self_attention_acts_on_each_token_alone(owned: slice) -> None:
    """A rank that owns some tokens, one of them even, needs the others in `attend` alone."""
    model, given = tiny(), inputs()
    results: list[Tensor] = []

    def keep(q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, key_bias: Tensor | None) -> Tensor:
        results.append(skip_sparse_attention(q, k, v, sparse=sparse, key_bias=key_bias))
        return results[-1]

    def replay(q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, key_bias: Tensor | None) -> Tensor:
        assert q.shape[1] == owned.stop - owned.start
        return results.pop(0)[:, owned]

    tokens: list[Tensor] = []
    handle = model.proj_out.register_forward_hook(lambda _, __, out: tokens.append(out))
    attend_by(model, keep)
    model(**given)
    handle.remove()

    attend_by(model, replay)
    model.pos_embed.register_forward_hook(lambda _, __, out: out[:, owned])
    model.rotary.register_forward_hook(lambda _, __, out: tuple(x[owned] for x in out))

    def gather(module: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        assert worst(out, tokens[0][:, owned]) < 1e-5
        return tokens[0]

    model.proj_out.register_forward_hook(gather)
    model(**given)
    assert not results


def test_inpainting_sums_three_embeddings() -> None:
    plain, model = tiny(), tiny(vae_scale_factor_t=4)
    extra = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in plain.state_dict()}
    assert extra == {
        "pos_embed_masked_hidden_states.0.proj.weight": (36, 8, 2, 2),
        "pos_embed_masked_hidden_states.0.proj.bias": (36,),
        "pos_embed_masked_hidden_states.1.weight": (36, 36),
        "pos_embed_mask.0.proj.weight": (36, 4, 2, 2),
        "pos_embed_mask.0.proj.bias": (36,),
        "pos_embed_mask.1.weight": (36, 36),
    }
    model.load_state_dict(plain.state_dict(), strict=False)
    given = inputs()
    three = torch.cat((given["hidden_states"], torch.randn(2, 12, 3, 6, 10)), dim=1)
    out = model(**(given | {"hidden_states": three})).sample
    assert out.shape == given["hidden_states"].shape
    assert worst(out, plain(**given).sample) > 1e-3
    for embed in (model.pos_embed_masked_hidden_states, model.pos_embed_mask):
        embed[1].weight.zero_()
    assert torch.equal(model(**(given | {"hidden_states": three})).sample, plain(**given).sample)


def test_models_know_nothing_of_ranks() -> None:
    for file in sorted(Path(osp.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            assert not any(f"{name}.".startswith("torch.distributed.") for name in names), file


def test_released_sizes() -> None:
    released = manifest("dit_2B")
    with torch.device("meta"):
        model = OpenSoraPlanTransformer3DModel(**released["config"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == released["keys"]
    assert sum(p.numel() for p in model.parameters()) == released["num_params"] == 2_771_981_600
    with torch.device("meta"):
        assert OpenSoraPlanTransformer3DModel().state_dict().keys() == released["keys"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 8, 3, 7, 10)}, "7 rows, must be a multiple of 2, nearest is 8"),
        ({"hidden_states": torch.zeros(2, 4, 3, 6, 10)}, r"hidden_states \[2, 4, 3, 6, 10\] must be \[B, 8"),
        ({"timestep": torch.zeros(3)}, r"timestep \[3\] must be a scalar or \[2\]"),
        ({"attention_mask": torch.ones(2, 3, 3, 5)}, r"attention_mask \[2, 3, 3, 5\] must be \[2, 3, 6, 10\]"),
        (
            {"encoder_hidden_states": torch.zeros(2, 9, 20)},
            r"encoder_hidden_states \[2, 9, 20\] must be \[B, 1, L, 20\]",
        ),
        ({"encoder_attention_mask": torch.ones(2, 9)}, r"encoder_attention_mask \[2, 9\] must be \[2, 1, 9\]"),
        ({"encoder_hidden_states": torch.zeros(1, 1, 9, 20), "encoder_attention_mask": None}, "batch of 2"),
        ({"encoder_hidden_states": None}, "needs text"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(**(inputs() | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_head_dim": 16, "cross_attention_dim": 48}, "attention_head_dim=16 .* nearest is 18"),
        ({"cross_attention_dim": 40}, "cross_attention_dim=40 must be .* 36"),
        ({"sparse_n": 2}, "sparse_n=2"),
        ({"sparse1d": False, "sparse_n": 4}, "sparse_n=4 with sparse1d=False"),
        ({"patch_size_t": 2}, "patch_size_t=2"),
        ({"double_self_attention": True}, "double_self_attention=True"),
    ],
)
def test_configurations_without_a_model_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenSoraPlanTransformer3DModel(**(TINY | options))
