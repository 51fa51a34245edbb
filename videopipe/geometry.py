"""Sizes of pixels, latents and tokens: plain integer arithmetic, no torch."""

import msgspec


class VideoSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished clip looks like: height and width in px, number of frames, frames per second."""

    height: int
    width: int
    num_frames: int
    fps: float = 24.0


class TokenGrid(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one clip in the denoiser: frames x rows x cols of video patches, and text tokens."""

    frames: int
    rows: int
    cols: int
    text: int = 0

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return self.frames * self.rows * self.cols

    @property
    def total(self) -> int:
        """Number of video and text tokens together."""
        return self.video + self.text


class LatentGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """How a VAE compresses (stride) and a DiT patchifies (patch) a clip.

    `channels` latent channels; one latent frame covers `stride_t` frames (the first one a single frame: causal VAE),
    one latent pixel `stride_s` px; one token `patch_t` latent frames and `patch_s` x `patch_s` latent pixels.
    """

    channels: int
    stride_t: int
    stride_s: int
    patch_t: int
    patch_s: int

    @property
    def multiple_s(self) -> int:
        """Height and width in px must be multiples of this."""
        return self.stride_s * self.patch_s

    @property
    def multiple_t(self) -> int:
        """num_frames must be 1 + k * multiple_t, with patch_t whole latent frames."""
        return self.stride_t

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of `num_frames` frames."""
        return (num_frames - 1) // self.stride_t + 1

    def latent_shape(self, spec: VideoSpec) -> tuple[int, int, int, int, int]:
        """Shape [1, C, T', H', W'] of the latents of one clip."""
        frames = self.latent_frames(spec.num_frames)
        return (1, self.channels, frames, spec.height // self.stride_s, spec.width // self.stride_s)

    def token_grid(self, spec: VideoSpec, text: int = 0) -> TokenGrid:
        """Token counts of one clip, with `text` text tokens."""
        _, _, frames, rows, cols = self.latent_shape(spec)
        return TokenGrid(frames=frames // self.patch_t, rows=rows // self.patch_s, cols=cols // self.patch_s, text=text)

    def check(self, spec: VideoSpec, where: str = "") -> None:
        """Refuse a size that this model cannot render.

        Args:
            spec: the size asked for.
            where: prefix of the field's path in the message, such as `"requests[3]."`.
        Raises:
            ValueError: names the field, the value and the nearest valid value.
        """
        for field, value in (("height", spec.height), ("width", spec.width)):
            near = nearest_multiple(value, self.multiple_s)
            if value != near:
                raise ValueError(f"{where}{field}={value} must be a multiple of {self.multiple_s}, nearest is {near}")
        near = self.nearest_num_frames(spec.num_frames)
        if spec.num_frames != near:
            rule = f"1 + k*{self.stride_t}"
            if self.patch_t > 1:
                rule += f" in groups of {self.patch_t} latent frames"
            raise ValueError(f"{where}num_frames={spec.num_frames} must be {rule}, nearest is {near}")
        if not 0 < spec.fps <= 1000:
            nearest_fps = 24 if spec.fps <= 0 else 1000
            raise ValueError(f"{where}fps={spec.fps:g} must be between 0 and 1000, nearest is {nearest_fps}")

    def nearest_num_frames(self, num_frames: int) -> int:
        """The valid number of frames closest to `num_frames` (the larger of two equally close ones)."""
        groups = max(1, self.latent_frames(max(num_frames, 1)) // self.patch_t)
        candidates = [1 + ((groups + d) * self.patch_t - 1) * self.stride_t for d in (-1, 0, 1) if groups + d >= 1]
        return min(candidates, key=lambda n: (abs(n - num_frames), -n))


def nearest_multiple(value: int, multiple: int) -> int:
    """The positive multiple of `multiple` closest to `value` (the larger of two equally close ones)."""
    below = value // multiple * multiple
    nearest = below if value - below < below + multiple - value else below + multiple
    return max(nearest, multiple)
