"""WF-VAE equals what the official code recorded, and any split of the time axis gives the whole clip's result."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.models import wf_vae, wf_vae_layers
from pipelines.models.wf_vae import WFVAEModel
from pipelines.models.wf_vae_layers import Stream, haar_2d, haar_3d, inverse_haar_2d, inverse_haar_3d
from tests.osp_recorded import Recorded, draw, manifest, vae_scale

CASES = ("image_t1", "video_t29")
RELEASED = {"norm_type": "layernorm", "t_interpolation": "trilinear", "connect_res_layer_num": 2}
TINY = RELEASED | {
    "base_channels": 4,
    "encoder_energy_flow_hidden_size": 3,
    "decoder_energy_flow_hidden_size": 4,
}


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded("wfvae_tiny")


@pytest.fixture(scope="module")
def model(recorded: Recorded) -> WFVAEModel:
    model = WFVAEModel(**recorded.config).eval().requires_grad_(False)
    model.load_state_dict(draw({k: v.shape for k, v in model.state_dict().items()}, recorded.seed, vae_scale))
    return model


def tiny(seed: int = 0, **options: object) -> WFVAEModel:
    model = WFVAEModel(**(TINY | options)).eval().requires_grad_(False)
    model.load_state_dict(draw({k: v.shape for k, v in model.state_dict().items()}, seed, vae_scale))
    return model.double()  # so that what only differs in rounding is far from what differs


TRILINEAR, NEAREST = tiny(), tiny(t_interpolation="nearest")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(frames: int, height: int = 8, width: int = 16, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=_generator(seed), dtype=torch.float64) * 2 - 1


def latents(frames: int, rows: int = 1, cols: int = 2, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 8, frames, rows, cols, generator=_generator(seed), dtype=torch.float64)


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_recorded_outputs(recorded: Recorded, model: WFVAEModel, case: str, chunk: int | None) -> None:
    inputs, outputs = recorded.part(f"{case}/inputs"), recorded.part(f"{case}/outputs")
    moments = torch.cat(list(model.encode_stream(inputs["video"], chunk)), dim=2)
    assert worst(moments, outputs["encode_parameters"]) < 2e-5
    assert worst(torch.cat(list(model.decode_stream(inputs["latents"], chunk)), dim=2), outputs["decode"]) < 2e-5
    if chunk is None:
        posterior = model.encode(inputs["video"]).latent_dist
        assert torch.equal(posterior.parameters, moments)
        assert worst(posterior.logvar, outputs["encode_logvar"]) < 2e-5
        assert worst(model.decode(inputs["latents"]).sample, outputs["decode"]) < 2e-5


def swapped_bands(low: Tensor, order: list[int]) -> Tensor:
    return torch.cat([low.chunk(len(order), dim=1)[i] for i in order], dim=1)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("HAAR_3D_SCALE", 1 / (2 * math.sqrt(2))),
        ("haar_2d", lambda x: swapped_bands(haar_2d(x), [0, 2, 1, 3])),
        ("haar_3d", lambda x, first: swapped_bands(haar_3d(x, first), [0, 2, 1, 3, 4, 6, 5, 7])),
        ("inverse_haar_2d", lambda x: inverse_haar_2d(swapped_bands(x, [0, 2, 1, 3]))),
        ("inverse_haar_3d", lambda x, first: inverse_haar_3d(swapped_bands(x, [0, 2, 1, 3, 4, 6, 5, 7]), first)),
    ],
)
def test_other_wavelets_are_noticed(
    recorded: Recorded, model: WFVAEModel, monkeypatch: pytest.MonkeyPatch, name: str, broken: object
) -> None:
    monkeypatch.setattr(wf_vae_layers if name.isupper() else wf_vae, name, broken)
    inputs, outputs = recorded.part("image_t1/inputs"), recorded.part("image_t1/outputs")
    encoded = worst(model.encode(inputs["video"]).latent_dist.parameters, outputs["encode_parameters"])
    decoded = worst(model.decode(inputs["latents"]).sample, outputs["decode"])
    assert max(encoded, decoded) > 6e-5  # three times the tolerance above; the scale alone makes 1e-4


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_wavelets_are_inverted(frames: int) -> None:
    x = clip(frames, 8, 12, batch=2)
    assert worst(inverse_haar_2d(haar_2d(x)), x) < 1e-12
    assert worst(inverse_haar_3d(haar_3d(x)), x * (8 * wf_vae_layers.HAAR_3D_SCALE**2)) < 1e-12


# --- chunks of time


@settings(max_examples=16, deadline=None, derandomize=True)
@given(frames=st.integers(1, 9), chunk=st.integers(1, 10), nearest=st.booleans(), batch=st.integers(1, 2))
@example(frames=2, chunk=1, nearest=False, batch=1)  # upstream raises
@example(frames=6, chunk=4, nearest=False, batch=1)  # upstream's tail is wrong
@example(frames=10, chunk=2, nearest=False, batch=1)
def test_decoding_in_chunks_equals_the_whole(frames: int, chunk: int, nearest: bool, batch: int) -> None:
    model = NEAREST if nearest else TRILINEAR
    z = latents(frames, batch=batch, seed=frames)
    whole = model.decode(z).sample
    assert whole.shape == (batch, 3, 4 * frames - 3, 8, 16)
    parts = list(model.decode_stream(z, chunk))
    assert len(parts) == -(-frames // chunk)
    assert worst(torch.cat(parts, dim=2), whole) < 1e-10


@settings(max_examples=8, deadline=None, derandomize=True)
@given(frames=st.integers(1, 6), chunk=st.integers(1, 7), batch=st.integers(1, 2))
def test_encoding_in_chunks_equals_the_whole(frames: int, chunk: int, batch: int) -> None:
    x = clip(4 * frames - 3, batch=batch, seed=frames)
    whole = TRILINEAR.encode(x).latent_dist.parameters
    assert whole.shape == (batch, 16, frames, 1, 2)
    assert worst(torch.cat(list(TRILINEAR.encode_stream(x, chunk)), dim=2), whole) < 1e-10


def test_tiling_is_a_switch() -> None:
    model, z, x = tiny(), latents(7), clip(25)
    whole, moments = model.decode(z).sample, model.encode(x).latent_dist.parameters
    sizes: list[int] = []
    for coder in (model.encoder.conv_out, model.decoder.conv_in):
        coder.register_forward_hook(lambda _, args, out: sizes.append(out.shape[2]))
    model.enable_tiling(encode_chunk=3, decode_chunk=2)
    assert worst(model.decode(z).sample, whole) < 1e-10
    assert worst(model.encode(x).latent_dist.parameters, moments) < 1e-10
    assert sizes == [2, 2, 2, 1, 3, 3, 1]
    model.disable_tiling()
    assert torch.equal(model.decode(z).sample, whole)


class Forgetful(Stream):
    """Remembers nothing of one kind of layer."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def keep(self, layer: torch.nn.Module, frames: Tensor) -> None:
        if not isinstance(layer, self.kind):
            super().keep(layer, frames)


@pytest.mark.parametrize("kind", [wf_vae_layers.CausalConv3d, wf_vae_layers.TimeUpsample])
def test_forgotten_past_is_noticed(kind: type) -> None:
    z = latents(5)
    stream, parts = Forgetful(kind), []
    for i in range(5):
        stream.first, stream.last = i == 0, i == 4
        if kind is wf_vae_layers.TimeUpsample:
            stream.last = True  # ends each chunk as if it were the clip's last: no frame is withheld
        parts.append(TRILINEAR.decoder(z[:, :, [i]], stream))
    whole = TRILINEAR.decode(z).sample
    assert sum(part.shape[2] for part in parts) == whole.shape[2]
    assert worst(torch.cat(parts, dim=2), whole) > 1e-2


def test_chunks_hold_no_view_of_the_clip() -> None:
    stream = Stream(last=False)
    TRILINEAR.decoder(latents(6), stream)
    assert stream.past
    for frames in stream.past.values():
        assert frames.untyped_storage().nbytes() == frames.numel() * frames.element_size()
        assert frames.shape[2] <= 2
    stream.first, stream.last = False, True
    TRILINEAR.decoder(latents(2), stream)
    assert not stream.past


def test_first_frame_does_not_blend_with_the_second() -> None:
    """An image decodes as the first frame of a clip does."""
    z = latents(4)
    assert worst(TRILINEAR.decode(z).sample[:, :, :1], TRILINEAR.decode(z[:, :, :1]).sample) < 1e-10
    x = clip(9)
    assert worst(TRILINEAR.encode(x).latent_dist.mean[:, :, :1], TRILINEAR.encode(x[:, :, :1]).latent_dist.mean) < 1e-10


def test_time_interpolation_matters() -> None:
    z = latents(3)
    assert worst(TRILINEAR.decode(z).sample, NEAREST.decode(z).sample) > 1e-2


# --- constructor, keys, latents


def test_released_sizes() -> None:
    released = manifest("wfvae_8ch")
    with torch.device("meta"):
        model = WFVAEModel(**released["config"])
        assert WFVAEModel(**RELEASED).state_dict().keys() == model.state_dict().keys()
    constants = set(released["hardcoded_wavelet_keys"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {
        k: v for k, v in released["keys"].items() if k not in constants
    }
    assert len(model.state_dict()) == 220
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, model.encoder, model.decoder)]
    assert counts == [released["num_params"], released["encoder_params"], released["decoder_params"]]


def test_stored_wavelet_filters_are_skipped_and_nothing_else() -> None:
    model = tiny()
    state = dict(model.state_dict())
    state["encoder.wavelet_tranform_l1.aa"] = torch.zeros(1, 1, 2, 2)
    model.load_state_dict(state, strict=True)
    assert "encoder.wavelet_tranform_l1.aa" in state  # the caller's mapping is left as it is
    with pytest.raises(RuntimeError, match=r"encoder\.extra"):
        model.load_state_dict(state | {"encoder.extra": torch.zeros(1)})


@pytest.mark.parametrize(
    "options",
    [
        {"connect_res_layer_num": 1, "t_interpolation": "nearest"},
        {"use_attention": False},
        {"encoder_num_resblocks": 1, "decoder_num_resblocks": 3},
        {"norm_type": "groupnorm", "base_channels": 32, "encoder_energy_flow_hidden_size": 32,
         "decoder_energy_flow_hidden_size": 32},
        {"latent_dim": 4, "scale": (0.2,) * 4, "shift": (0.1,) * 4},
    ],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_other_configurations(options: dict[str, object]) -> None:
    model = tiny(**options)
    z = model.encode(clip(5)).latent_dist.mode()
    assert z.shape == (1, model.config.latent_dim, 2, 1, 2)
    assert model.decode(z).sample.shape == (1, 3, 5, 8, 16)
    if model.config.norm_type == "groupnorm":
        for enter in (model.enable_tiling, lambda: model.decode_stream(z, 1)):
            with pytest.raises(ValueError, match="needs norm_type='layernorm'"):
                enter()
    else:
        assert worst(torch.cat(list(model.decode_stream(z, 1)), dim=2), model.decode(z).sample) < 1e-10


def test_latents_of_the_denoiser() -> None:
    model = tiny(scale=tuple(0.1 * i + 0.1 for i in range(8)), shift=tuple(0.3 * i for i in range(8)))
    z = latents(2)
    scaled = model.scale_latents(z)
    assert torch.allclose(scaled[:, 3], (z[:, 3] - 0.9) * 0.4)
    assert worst(model.unscale_latents(scaled), z) < 1e-10


def test_sampling_is_seeded() -> None:
    posterior = TRILINEAR.encode(clip(5)).latent_dist
    a, b, c = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert worst(a, c) > 1e-3
    assert torch.equal(posterior.mode(), posterior.parameters[:, :8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(clip(6)), r"num_frames=6 .* 1 \+ k\*4, nearest is 5"),
        (lambda m: m.encode(clip(4)), "num_frames=4 .* nearest is 5"),
        (lambda m: m.encode(clip(5, 12, 16)), "height=12 .* multiple of 8, nearest is 16"),
        (lambda m: m.encode(clip(5, 16, 3)), "width=3 .* nearest is 8"),
        (lambda m: m.encode(clip(5)[:, :1]), r"\(1, 1, 5, 8, 16\) must be \[B, 3, T, H, W\]"),
        (lambda m: m.decode(latents(2)[:, :4]), r"\(1, 4, 2, 1, 2\) must be \[B, 8, T', H', W'\]"),
        (lambda m: m.decode_stream(latents(2), 0), "decode_chunk=0 must be at least 1"),
        (lambda m: m.enable_tiling(encode_chunk=-1), "encode_chunk=-1 must be at least 1"),
        (lambda m: tiny(norm_type="batchnorm"), "norm_type='batchnorm'"),
        (lambda m: tiny(t_interpolation="cubic"), "t_interpolation='cubic'"),
        (lambda m: tiny(latent_dim=4), "scale has 8 values, must have latent_dim=4"),
        (lambda m: tiny(l2_upsample_block="Upsample"), "l2_upsample_block='Upsample'"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[WFVAEModel], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(TRILINEAR)
