"""The layers of WF-VAE: what each remembers between chunks of time, and the Haar wavelets.

Shapes: B batch, C channels, T or t frames, H W or h w rows and cols, at whatever resolution the layer stands.

Source: WF-VAE: Enhancing Video VAE by Wavelet-Driven Energy Flow (arXiv 2411.17459); the names of the learned tensors
are those of Open-Sora-Plan v1.3.1 (github.com/PKU-YuanGroup/Open-Sora-Plan). The code is our own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAAR_3D_SCALE = 0.3536  # as trained: close to 1 / (2 sqrt 2), not equal to it
HAAR_2D_SCALE = 0.5


class Stream:
    """What one pass over a clip remembers between its chunks of time.

    `first` and `last` say whether the present chunk opens or closes the clip; `past` holds, for each layer that needs
    it, the frames [B, C, t, h, w] that its next chunk begins with.
    """

    def __init__(self, first: bool = True, last: bool = True) -> None:
        self.first = first
        self.last = last
        self.past: dict[nn.Module, Tensor] = {}

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Remember `frames` for the layer's next chunk, as a copy: a view would keep the whole chunk in memory."""
        if self.last:
            self.past.pop(layer, None)
        else:
            self.past[layer] = frames.clone()


class Timed(nn.Module):
    """A layer that looks along time: called with [B, C, t, h, w] and the stream."""


class CausalConv3d(Timed):
    """3D convolution whose frame t sees no later frame; the clip's first frame is repeated in front of it."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, pad_s: bool = True) -> None:
        super().__init__()
        padding = kernel // 2 if pad_s else 0
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride=stride, padding=(0, padding, padding))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        before = self.conv.kernel_size[0] - 1
        if before == 0:
            return self.conv(x)
        past = stream.past[self] if self in stream.past else x[:, :, :1].expand(-1, -1, before, -1, -1)
        x = torch.cat((past, x), dim=2)
        stride = self.conv.stride[0]
        outputs = (x.shape[2] - 1 - before) // stride + 1
        stream.keep(self, x[:, :, outputs * stride :])
        return self.conv(x)


class ResnetBlock3D(Timed):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), the skip through a 1x1x1 convolution where channels change."""

    def __init__(self, c_in: int, c_out: int, dropout: float, norm_type: str) -> None:
        super().__init__()
        self.norm1 = make_norm(norm_type, c_in)
        self.conv1 = CausalConv3d(c_in, c_out, 3)
        self.norm2 = make_norm(norm_type, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(c_out, c_out, 3)
        self.nin_shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), stream)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))), stream)
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x, stream))


class SpatialAttention(Timed):
    """Single-head attention among the pixels of each frame, with a residual."""

    def __init__(self, channels: int, norm_type: str) -> None:
        super().__init__()
        self.norm = make_norm(norm_type, channels)
        self.q = CausalConv3d(channels, channels, 1)
        self.k = CausalConv3d(channels, channels, 1)
        self.v = CausalConv3d(channels, channels, 1)
        self.proj_out = CausalConv3d(channels, channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        B, _, T, H, W = x.shape
        h = self.norm(x)
        # [B, C, T, H, W] -> [B*T, 1, H*W, C]; keys and values may be of more rows than x
        q, k, v = (
            layer(h, stream).permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2)[:, None]
            for layer in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.reshape(B, T, H, W, -1).permute(0, 4, 1, 2, 3)
        return x + self.proj_out(out, stream)


class TimeDownsample(Timed):
    """Half the rows, cols and frames (2n - 1 -> n) by one strided convolution, padded at the right and bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2, pad_s=False)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), stream)


class TimeUpsample(Timed):
    """Twice the rows and cols, and n -> 2n - 1 frames: the clip's first frame stays single, the others are doubled.

    The doubled frames are interpolated among themselves: frame 1 does not blend with frame 0.
    """

    def __init__(self, channels: int, t_interpolation: str) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3)
        self.interpolate = Interpolate()
        self.t_interpolation = t_interpolation

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        parts = []
        if stream.first:
            parts.append(self.interpolate(x[:, :, :1], 1))
            x = x[:, :, 1:]
        if self.t_interpolation == "nearest":
            if x.shape[2]:
                parts.append(self.interpolate(x.repeat_interleave(2, dim=2), 1))
        else:
            held = self in stream.past  # a frame whose second output still waits for its successor
            if held:
                x = torch.cat((stream.past[self], x), dim=2)
            if x.shape[2]:
                doubled = self.interpolate(x, 2)
                parts.append(doubled[:, :, int(held) : doubled.shape[2] - int(not stream.last)])
                stream.keep(self, x[:, :, -1:])
        return self.conv(torch.cat(parts, dim=2), stream)


class Interpolate(nn.Module):
    """Twice the rows and cols of [B, C, t, h, w] by linear interpolation, and `times` the frames; edges are clamped."""

    def forward(self, x: Tensor, times: int) -> Tensor:
        return F.interpolate(x, scale_factor=(float(times), 2.0, 2.0), mode="trilinear", align_corners=False)


class ResnetBlock2D(nn.Module):
    """The residual block on single frames [B*T, C, h, w]."""

    def __init__(self, channels: int, dropout: float, norm_type: str) -> None:
        super().__init__()
        self.norm1 = make_norm(norm_type, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = make_norm(norm_type, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Downsample(nn.Module):
    """Half the rows and cols of single frames [B*T, C, h, w], padded at the right and bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the rows and cols of single frames [B*T, C, h, w], nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel, [B, C, ...]: no statistic crosses space or time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(norm_type: str, channels: int) -> nn.Module:
    """A norm over [B, C, ...]: "layernorm" or "groupnorm" (32 groups)."""
    return ChannelNorm(channels) if norm_type == "layernorm" else nn.GroupNorm(32, channels, eps=1e-6)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer for images to each frame of [B, C, T, H, W]."""
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def run(layers: nn.ModuleList, x: Tensor, stream: Stream) -> Tensor:
    """Apply layers in order to [B, C, t, h, w], those for images frame by frame."""
    for layer in layers:
        x = layer(x, stream) if isinstance(layer, Timed) else per_frame(layer, x)
    return x


def haar_3d(x: Tensor, first: bool = True) -> Tensor:
    """3D Haar bands [B, 8C, t/2, H/2, W/2] of [B, C, t, H, W]; `first`: repeat the first frame in front.

    Bands are major, channels minor; low before high, time slowest, then height, then width.
    """
    if first:
        x = torch.cat((x[:, :, :1], x), dim=2)
    bands = [x * HAAR_3D_SCALE]
    for dim in (2, 3, 4):
        bands = [half for band in bands for half in _split(band, dim)]
    return torch.cat(bands, dim=1)


def inverse_haar_3d(bands: Tensor, first: bool = True) -> Tensor:
    """Frames [B, C, 2t, 2h, 2w] of 3D Haar bands [B, 8C, t, h, w]; `first`: drop the first frame."""
    parts = list((bands * HAAR_3D_SCALE).chunk(8, dim=1))
    for dim in (4, 3, 2):
        parts = [_merge(low, high, dim) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0][:, :, 1:] if first else parts[0]


def haar_2d(x: Tensor) -> Tensor:
    """2D Haar bands [B, 4C, T, H/2, W/2] of [B, C, T, H, W] in the order low, height-high, width-high, both."""
    bands = [x * HAAR_2D_SCALE]
    for dim in (4, 3):
        bands = [half for band in bands for half in _split(band, dim)]
    return torch.cat(bands, dim=1)


def inverse_haar_2d(bands: Tensor) -> Tensor:
    """Frames [B, C, T, 2h, 2w] of 2D Haar bands [B, 4C, T, h, w]."""
    parts = list((bands * HAAR_2D_SCALE).chunk(4, dim=1))
    for dim in (3, 4):
        parts = [_merge(low, high, dim) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _split(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return even + odd, even - odd


def _merge(low: Tensor, high: Tensor, dim: int) -> Tensor:
    return torch.stack((low + high, low - high), dim=dim + 1).flatten(dim, dim + 1)
