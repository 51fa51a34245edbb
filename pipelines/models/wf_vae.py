"""WF-VAE: the causal wavelet video autoencoder of Open-Sora-Plan 1.3, encoded and decoded in chunks of time, exactly.

Shapes: B batch, C channels, T H W frames, rows, cols in px, T' H' W' the same of the latents; T = 4 T' - 3, H = 8 H',
W = 8 W'. Between the wavelets a clip has 2 T' - 1 coefficient frames.

Every layer takes a `Stream`, which holds what the layers remember of the frames before this chunk. A whole clip is one
chunk that is both first and last, so there is one code path. Linear interpolation in time needs one frame of the
future: a layer that lacks it withholds its last output frame and emits it in the next chunk; nothing is computed twice
and any split of the time axis gives the result of the whole clip.

Source: WF-VAE: Enhancing Video VAE by Wavelet-Driven Energy Flow (arXiv 2411.17459); the sizes and names of the learned
tensors are those of Open-Sora-Plan v1.3.1 (github.com/PKU-YuanGroup/Open-Sora-Plan). The code is our own.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from pipelines.models.open_sora_plan_layout import DEFAULT_DECODE_CHUNK, STRIDE_S, STRIDE_T
from pipelines.models.wf_vae_layers import (
    CausalConv3d,
    Downsample,
    ResnetBlock2D,
    ResnetBlock3D,
    SpatialAttention,
    Stream,
    TimeDownsample,
    TimeUpsample,
    Upsample,
    haar_2d,
    haar_3d,
    inverse_haar_2d,
    inverse_haar_3d,
    make_norm,
    per_frame,
    run,
)

DEFAULT_ENCODE_CHUNK = 8

_FIXED_BLOCKS = {
    "l1_dowmsample_block": "Downsample",
    "l1_downsample_wavelet": "HaarWaveletTransform2D",
    "l2_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l2_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Upsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform2D",
    "l2_upsample_block": "Spatial2xTime2x3DUpsample",
    "l2_upsample_wavelet": "InverseHaarWaveletTransform3D",
}


class WFVAEModel(ModelMixin, ConfigMixin):
    """The autoencoder: pixels [B, 3, T, H, W] in [-1, 1] to latents [B, C, T', H', W'] and back.

    The arguments are the keys of upstream's config.json ("dowmsample" included); the defaults are upstream's, the
    released checkpoint has `connect_res_layer_num=2, norm_type="layernorm", t_interpolation="trilinear"`. The state
    dict holds the learned tensors alone: upstream's also holds constant wavelet filters, which loading skips.

    Raises:
        ValueError: an option that upstream does not know, or `scale` and `shift` of another length than `latent_dim`.
    """

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"wavelet"]
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 8,
        base_channels: int = 128,
        encoder_num_resblocks: int = 2,
        encoder_energy_flow_hidden_size: int = 64,
        decoder_num_resblocks: int = 2,
        decoder_energy_flow_hidden_size: int = 128,
        use_attention: bool = True,
        dropout: float = 0.0,
        norm_type: str = "groupnorm",
        t_interpolation: str = "nearest",
        connect_res_layer_num: int = 1,
        scale: tuple[float, ...] = (0.18215,) * 8,
        shift: tuple[float, ...] = (0.0,) * 8,
        l1_dowmsample_block: str = "Downsample",
        l1_downsample_wavelet: str = "HaarWaveletTransform2D",
        l2_dowmsample_block: str = "Spatial2xTime2x3DDownsample",
        l2_downsample_wavelet: str = "HaarWaveletTransform3D",
        l1_upsample_block: str = "Upsample",
        l1_upsample_wavelet: str = "InverseHaarWaveletTransform2D",
        l2_upsample_block: str = "Spatial2xTime2x3DUpsample",
        l2_upsample_wavelet: str = "InverseHaarWaveletTransform3D",
    ) -> None:
        super().__init__()
        for name, only in _FIXED_BLOCKS.items():
            if self.config[name] != only:
                raise ValueError(f"{name}={self.config[name]!r} is not built here, the only one is {only!r}")
        if norm_type not in ("layernorm", "groupnorm"):
            raise ValueError(f"norm_type={norm_type!r} must be 'layernorm' or 'groupnorm'")
        if t_interpolation not in ("trilinear", "nearest"):
            raise ValueError(f"t_interpolation={t_interpolation!r} must be 'trilinear' or 'nearest'")
        for name, values in (("scale", scale), ("shift", shift)):
            if len(values) != latent_dim:
                raise ValueError(f"{name} has {len(values)} values, must have latent_dim={latent_dim}")
        self.encoder = WFVAEEncoder(
            latent_dim=latent_dim,
            base_channels=base_channels,
            num_resblocks=encoder_num_resblocks,
            flow_channels=encoder_energy_flow_hidden_size,
            use_attention=use_attention,
            dropout=dropout,
            norm_type=norm_type,
        )
        self.decoder = WFVAEDecoder(
            latent_dim=latent_dim,
            base_channels=base_channels,
            num_resblocks=decoder_num_resblocks,
            flow_channels=decoder_energy_flow_hidden_size,
            connect_res_layer_num=connect_res_layer_num,
            use_attention=use_attention,
            dropout=dropout,
            norm_type=norm_type,
            t_interpolation=t_interpolation,
        )
        self.encode_chunk: int | None = None
        self.decode_chunk: int | None = None
        self.register_load_state_dict_pre_hook(_drop_wavelet_filters)

    def enable_tiling(self, encode_chunk: int = DEFAULT_ENCODE_CHUNK, decode_chunk: int = DEFAULT_DECODE_CHUNK) -> None:
        """Work in chunks of this many latent frames; the results stay those of the whole clip, the memory does not.

        There are no spatial tiles.

        Raises:
            ValueError: a chunk below 1, or a model with group norms, whose statistics span the whole clip.
        """
        for name, value in (("encode_chunk", encode_chunk), ("decode_chunk", decode_chunk)):
            self.check_chunk(name, value)
        self.encode_chunk = encode_chunk
        self.decode_chunk = decode_chunk

    def disable_tiling(self) -> None:
        """Work on whole clips."""
        self.encode_chunk = None
        self.decode_chunk = None

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of a clip.

        Args:
            x: pixels [B, 3, T, H, W] in [-1, 1], T = 1 + 4k, H and W multiples of 8.
            return_dict: whether to wrap the distribution as `.latent_dist` or to return it in a tuple.
        Returns:
            A diagonal Gaussian whose `.parameters` [B, 2C, T', H', W'] hold the means, then the log variances (not
            yet clamped to [-30, 20] as `.logvar` is). Upstream's encode path samples it.
        Raises:
            ValueError: a size that would be cut off silently.
        """
        moments = torch.cat(list(self.encode_stream(x, self.encode_chunk)), dim=2)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pixels [B, 3, T, H, W], around [-1, 1] and not clamped, of latents [B, C, T', H', W'].

        The latents are those of the VAE, not of the denoiser: see `unscale_latents`.

        Raises:
            ValueError: latents of the wrong shape.
        """
        sample = torch.cat(list(self.decode_stream(z, self.decode_chunk)), dim=2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode_stream(self, x: Tensor, chunk: int | None) -> Iterator[Tensor]:
        """Moments of `chunk` latent frames at a time (None: all at once), [B, 2C, t', H', W'] each.

        Raises:
            ValueError: as `encode` and `enable_tiling`.
        """
        _check_pixels(x)
        latent_frames = (x.shape[2] - 1) // STRIDE_T + 1
        spans = self._spans("encode_chunk", latent_frames, chunk)
        pieces = (x[:, :, max(0, STRIDE_T * start - 3) : STRIDE_T * stop - 3] for start, stop in spans)
        return _in_order(self.encoder, pieces, len(spans))

    def decode_stream(self, z: Tensor, chunk: int | None) -> Iterator[Tensor]:
        """Frames of `chunk` latent frames at a time (None: all at once), [B, 3, t, H, W] each, in order.

        A chunk that is not the last may withhold two frames, which come first in the next one.

        Raises:
            ValueError: as `decode` and `enable_tiling`.
        """
        if z.ndim != 5 or z.shape[1] != self.config.latent_dim or 0 in z.shape:
            raise ValueError(f"latents of shape {tuple(z.shape)} must be [B, {self.config.latent_dim}, T', H', W']")
        spans = self._spans("decode_chunk", z.shape[2], chunk)
        return _in_order(self.decoder, (z[:, :, start:stop] for start, stop in spans), len(spans))

    def scale_latents(self, z: Tensor) -> Tensor:
        """Latents of the VAE [B, C, T', H', W'] as the denoiser sees them."""
        return (z - self._per_channel("shift", z)) * self._per_channel("scale", z)

    def unscale_latents(self, z: Tensor) -> Tensor:
        """Latents of the denoiser [B, C, T', H', W'] as the VAE sees them; the inverse of `scale_latents`."""
        return z / self._per_channel("scale", z) + self._per_channel("shift", z)

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, generator: torch.Generator | None = None
    ) -> DecoderOutput:
        """Pixels [B, 3, T, H, W] encoded and decoded again, through the mean or a sample of the distribution."""
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z)

    def _per_channel(self, key: str, like: Tensor) -> Tensor:
        return torch.tensor(self.config[key], dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)

    def check_chunk(self, name: str, chunk: int) -> None:
        """Refuse chunks of so many latent frames, by the name of the setting, where they are not exact.

        Raises:
            ValueError: a chunk below 1, or a model with group norms, whose statistics span the whole clip.
        """
        if chunk < 1:
            raise ValueError(f"{name}={chunk} must be at least 1 latent frame, nearest is 1")
        if self.config.norm_type != "layernorm":
            raise ValueError(
                f"{name}={chunk} needs norm_type='layernorm': the statistics of {self.config.norm_type!r} span the "
                "whole clip, so chunks cannot give its result; use whole clips"
            )

    def _spans(self, name: str, latent_frames: int, chunk: int | None) -> list[tuple[int, int]]:
        if chunk is None:
            return [(0, latent_frames)]
        self.check_chunk(name, chunk)
        return [(start, min(start + chunk, latent_frames)) for start in range(0, latent_frames, chunk)]


class WFVAEEncoder(nn.Module):
    """Pixels [B, 3, T, H, W] to moments [B, 2C, T', H', W']; the low bands of each wavelet level flow in beside."""

    def __init__(
        self,
        *,
        latent_dim: int,
        base_channels: int,
        num_resblocks: int,
        flow_channels: int,
        use_attention: bool,
        dropout: float,
        norm_type: str,
    ) -> None:
        super().__init__()
        c1, c2, c4 = base_channels, base_channels * 2, base_channels * 4
        self.down1 = nn.Sequential(
            nn.Conv2d(24, c1, 3, padding=1),
            *(ResnetBlock2D(c1, dropout, norm_type) for _ in range(num_resblocks)),
            Downsample(c1),
        )
        self.down2 = nn.ModuleList(
            [
                nn.Conv2d(c1 + flow_channels, c2, 3, padding=1),
                *(ResnetBlock3D(c2, c2, dropout, norm_type) for _ in range(num_resblocks)),
                TimeDownsample(c2),
            ]
        )
        self.connect_l1 = nn.Conv2d(12, flow_channels, 3, padding=1)
        self.connect_l2 = nn.Conv2d(24, flow_channels, 3, padding=1)
        self.mid = _mid(c2 + flow_channels, c4, c4, use_attention, dropout, norm_type)
        self.norm_out = make_norm(norm_type, c4)
        self.conv_out = CausalConv3d(c4, 2 * latent_dim, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        bands = haar_3d(x, first=stream.first)  # [B, 24, 2T'-1, H/2, W/2]
        level1 = haar_2d(bands[:, :3])
        level2 = haar_3d(level1[:, :3], first=stream.first)
        flow1 = per_frame(self.connect_l1, level1)
        flow2 = per_frame(self.connect_l2, level2)
        h = per_frame(self.down1, bands)
        h = run(self.down2, torch.cat((h, flow1), dim=1), stream)
        h = run(self.mid, torch.cat((h, flow2), dim=1), stream)
        return self.conv_out(F.silu(self.norm_out(h)), stream)


class WFVAEDecoder(nn.Module):
    """Latents [B, C, T', H', W'] to pixels [B, 3, T, H, W]; the low bands are predicted level by level and added."""

    def __init__(
        self,
        *,
        latent_dim: int,
        base_channels: int,
        num_resblocks: int,
        flow_channels: int,
        connect_res_layer_num: int,
        use_attention: bool,
        dropout: float,
        norm_type: str,
        t_interpolation: str,
    ) -> None:
        super().__init__()
        c1, c2, c4, flow = base_channels, base_channels * 2, base_channels * 4, flow_channels
        self.flow_channels = flow
        self.conv_in = CausalConv3d(latent_dim, c4, 3)
        self.mid = _mid(c4, c4, c4 + flow, use_attention, dropout, norm_type)
        self.up2 = nn.ModuleList(
            [
                *(ResnetBlock3D(c4, c4, dropout, norm_type) for _ in range(num_resblocks)),
                TimeUpsample(c4, t_interpolation),
                ResnetBlock3D(c4, c4 + flow, dropout, norm_type),
            ]
        )
        self.up1 = nn.ModuleList(
            [
                *(ResnetBlock3D(c4 if i == 0 else c2, c2, dropout, norm_type) for i in range(num_resblocks)),
                Upsample(c2),
                ResnetBlock3D(c2, c2, dropout, norm_type),
            ]
        )
        self.layer = nn.ModuleList(
            [ResnetBlock3D(c2, c1, dropout, norm_type), ResnetBlock3D(c1, c1, dropout, norm_type)]
        )
        self.connect_l1 = nn.ModuleList(
            [
                *(ResnetBlock3D(flow, flow, dropout, norm_type) for _ in range(connect_res_layer_num)),
                nn.Conv2d(flow, 12, 3, padding=1),
            ]
        )
        self.connect_l2 = nn.ModuleList(
            [
                *(ResnetBlock3D(flow, flow, dropout, norm_type) for _ in range(connect_res_layer_num)),
                nn.Conv2d(flow, 24, 3, padding=1),
            ]
        )
        self.norm_out = make_norm(norm_type, c1)
        self.conv_out = nn.Conv2d(c1, 24, 3, padding=1)

    def forward(self, z: Tensor, stream: Stream) -> Tensor:
        h = run(self.mid, self.conv_in(z, stream), stream)
        low2 = inverse_haar_3d(run(self.connect_l2, h[:, -self.flow_channels :], stream), first=stream.first)
        h = run(self.up2, h[:, : -self.flow_channels], stream)
        if self in stream.past:
            low2 = torch.cat((stream.past[self], low2), dim=2)
        frames = h.shape[2]  # the time upsampling may withhold one frame, so low2 runs ahead by one
        stream.keep(self, low2[:, :, frames:])
        bands1 = _add_low(run(self.connect_l1, h[:, -self.flow_channels :], stream), low2[:, :, :frames])
        low1 = inverse_haar_2d(bands1)
        h = run(self.layer, run(self.up1, h[:, : -self.flow_channels], stream), stream)
        bands = _add_low(per_frame(self.conv_out, F.silu(self.norm_out(h))), low1)
        return inverse_haar_3d(bands, first=stream.first)


def _add_low(bands: Tensor, low: Tensor) -> Tensor:
    assert bands.shape[2:] == low.shape[2:], (bands.shape, low.shape)
    return torch.cat((bands[:, :3] + low, bands[:, 3:]), dim=1)


def _mid(c_in: int, c_mid: int, c_out: int, use_attention: bool, dropout: float, norm_type: str) -> nn.ModuleList:
    first, last = (
        ResnetBlock3D(c_in, c_mid, dropout, norm_type),
        ResnetBlock3D(c_mid, c_out, dropout, norm_type),
    )
    return nn.ModuleList([first, SpatialAttention(c_mid, norm_type), last] if use_attention else [first, last])


def _in_order(coder: nn.Module, pieces: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    stream = Stream()
    for i, piece in enumerate(pieces):
        stream.first, stream.last = i == 0, i == count - 1
        yield coder(piece, stream)


def _check_pixels(x: Tensor) -> None:
    if x.ndim != 5 or x.shape[1] != 3 or 0 in x.shape:
        raise ValueError(f"pixels of shape {tuple(x.shape)} must be [B, 3, T, H, W]")
    frames = x.shape[2]
    if (frames - 1) % STRIDE_T:
        near = (frames - 1 + STRIDE_T // 2) // STRIDE_T * STRIDE_T + 1
        raise ValueError(f"num_frames={frames} cannot be encoded: must be 1 + k*{STRIDE_T}, nearest is {near}")
    for name, value in (("height", x.shape[3]), ("width", x.shape[4])):
        if value % STRIDE_S:
            near = max(STRIDE_S, (value + STRIDE_S // 2) // STRIDE_S * STRIDE_S)
            raise ValueError(f"{name}={value} cannot be encoded: must be a multiple of {STRIDE_S}, nearest is {near}")


def _drop_wavelet_filters(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: object,
) -> None:
    for key in [key for key in state_dict if key.startswith(prefix) and "wavelet" in key]:
        del state_dict[key]
