"""A causal 3D convolution over a clip whose rows are sharded and whose frames come slab by slab.

At the clip's borders and before its first frame the nearest value is repeated; inside, rows come from the neighbours
and frames from the slab before. What the untiled convolution would see is laid out in one buffer.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vae_group.halo import neighbour_rows
from vae_group.team import Team


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How the rows of one resolution lie over a team."""

    team: Team
    counts: tuple[int, ...]

    @property
    def own(self) -> int:
        """Rows of this member."""
        return self.counts[self.team.member]

    def upsampled(self, factor: int) -> "Rows":
        """Each row `factor` times."""
        return Rows(team=self.team, counts=tuple(count * factor for count in self.counts))

    def downsampled(self, stride: int) -> "Rows":
        """Every `stride`-th row, from the clip's first; members begin at multiples of it."""
        return Rows(team=self.team, counts=tuple(-(-count // stride) for count in self.counts))


class CausalConv:
    """One convolution on its way through a clip: takes the slabs in order.

    Args:
        conv: kernel 1 or 3 in each dimension, any stride, no padding of its own.
        rows: how the rows of its input are sharded; with a stride, members begin at multiples of it.
        repeat: frames, rows and columns are repeated so many times before the convolution (nearest upsampling); the
            clip's first frame is not repeated in time.
    Raises:
        ValueError: a kernel of another size, or a dilation.
    """

    def __init__(self, conv: nn.Conv3d, rows: Rows, repeat: tuple[int, int, int] = (1, 1, 1)) -> None:
        if set(conv.kernel_size) - {1, 3} or len(set(conv.kernel_size)) > 1 or set(conv.dilation) != {1}:
            raise ValueError(
                f"kernel_size={conv.kernel_size} with dilation={conv.dilation} cannot be sharded, need kernel 1 or 3 "
                "in all dimensions, without dilation"
            )
        self._conv = conv
        self._rows = rows
        self._repeat = repeat
        self._border = conv.kernel_size[1] // 2
        self._past: Tensor | None = None  # the last frames of the buffer, which the next slab begins with

    def step(self, x: Tensor) -> Tensor:
        """[B, C, t, h, W] -> [B, C_out, t_out, h_out, W_out]; t_out may be 0 with a stride in time."""
        if self._border == 0:
            return self._conv(x) if x.numel() else self._nothing(x, x.shape[2], x.shape[4])
        B, C, t, h, W = x.shape
        if not t:
            return self._nothing(x, 0, W)
        seen = self._lay_out(x)
        del x
        kernel, stride = self._conv.kernel_size[0], self._conv.stride[0]
        frames = max(0, (seen.shape[2] - kernel) // stride + 1)
        self._past = seen[:, :, frames * stride :].clone()
        if not frames or not seen.shape[3]:
            return self._nothing(seen, frames, W)
        return self._conv(seen[:, :, : (frames - 1) * stride + kernel])

    def _lay_out(self, x: Tensor) -> Tensor:
        """What the convolution sees: past frames, this slab repeated, a border of rows and columns."""
        B, C, t, h, W = x.shape
        upper, lower = neighbour_rows(x, self._border, self._border, self._rows.team, self._rows.counts)
        in_time, in_rows, in_cols = self._repeat
        first = self._past is None
        past = self._conv.kernel_size[0] - 1 if self._past is None else self._past.shape[2]
        frames = past + (1 + (t - 1) * in_time if first else t * in_time)
        if not h:  # a member without rows keeps count of frames
            return x.new_empty(B, C, frames, 0, W * in_cols)
        seen = x.new_empty(B, C, frames, h * in_rows + 2, W * in_cols + 2)
        slab = seen[:, :, past:]
        above = upper if upper.shape[3] else x[:, :, :, :1]
        below = lower if lower.shape[3] else x[:, :, :, -1:]
        for target, source, times in (
            (slab[:, :, :, :1], above, 1),
            (slab[:, :, :, 1:-1], x, in_rows),
            (slab[:, :, :, -1:], below, 1),
        ):
            _repeat_into(target[..., 1:-1], source, (in_time, times, in_cols), first)
        slab[..., 0] = slab[..., 1]
        slab[..., -1] = slab[..., -2]
        seen[:, :, :past] = slab[:, :, :1] if self._past is None else self._past
        return seen

    def _nothing(self, x: Tensor, frames: int, cols: int) -> Tensor:
        """The result where there are no frames or no rows, of an input with so many columns."""
        rows_out, cols_out = (
            0 if not size else (size * times - 1) // stride + 1
            for size, times, stride in zip((self._rows.own, cols), self._repeat[1:], self._conv.stride[1:], strict=True)
        )
        return x.new_empty(x.shape[0], self._conv.out_channels, frames, rows_out, cols_out)


def _repeat_into(target: Tensor, source: Tensor, times: tuple[int, int, int], first: bool) -> None:
    """Write `source` into `target`, each value `times` times along frames, rows and columns.

    With `first` the first frame is the clip's, which is not repeated in time.
    """
    in_time, in_rows, in_cols = times
    if first and in_time > 1:
        _repeat_into(target[:, :, :1], source[:, :, :1], (1, in_rows, in_cols), False)
        target, source = target[:, :, 1:], source[:, :, 1:]
    B, C, t, h, W = source.shape
    if t:
        cells = target.unflatten(4, (W, in_cols)).unflatten(3, (h, in_rows)).unflatten(2, (t, in_time))
        cells.copy_(source[:, :, :, None, :, None, :, None])
