"""The denoiser of Open-Sora-Plan 1.3: a text-to-video diffusion transformer with skip-sparse attention.

Shapes: B batch, C latent channels, T' H' W' latent frames, rows, cols, S = T' * H'/2 * W'/2 video tokens in the order
frame, row, col, L text tokens, N heads, D head dim.

The model knows nothing of ranks. What parallelism needs is reachable from outside:

* Self-attention is a block's processor, `Attention.set_processor` of its `attn1`: after RoPE it needs q, k, v of all
  tokens that its `SkipSparse` pattern lets meet, of any number of heads, since heads are independent.
* `pos_embed` (tokens [B, S, N*D]) and `rotary` (cos, sin [S, D]) are the two places where the token axis begins and
  `proj_out` the one where it ends: a rank takes its tokens of the outputs of the first two and puts those of the last
  in their place. All else between them acts on each token alone, cross-attention included (each rank has the whole
  text). The key bias stays whole, because it meets whole sequences.

Source: Open-Sora Plan: Open-Source Large Video Generation Model (arXiv 2412.00131), v1.3.1
(github.com/PKU-YuanGroup/Open-Sora-Plan) for the sizes and names of the learned tensors; the code is our own. The
blocks have the keys of diffusers' AllegroTransformerBlock and equal it where attention is dense; they are written out
here because that one drops the token axis where a rank holds a single token and takes no cached text keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from pipelines.models.skip_sparse import SkipSparse, block_sparsity

MASKED = -10000.0  # added to the logits of keys to ignore
PADDED = -9980.0  # of keys that only fill up a group: preferred in a group that has no other key left


class Attend(Protocol):
    """How one self-attention is computed, and on which ranks."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, key_bias: Tensor | None) -> Tensor:
        """Attention output [B, S, N, D] in the dtype of q.

        Args:
            q, k, v: [B, S, N, D], q and k rotated by RoPE; S is what this rank owns.
            sparse: the block's pattern over the tokens of all ranks.
            key_bias: [B, S of all ranks] to add to the logits of each key, None for none.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TextContext:
    """A prompt as the blocks see it: it depends on no timestep, so one serves all steps of a clip.

    `keys` and `values` hold [B, L, N, D] for each block, `bias` is [B, L], added to the logits of each text token.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None

    def select(self, rows: slice) -> "TextContext":
        """The context of some rows of the batch, such as one branch of classifier-free guidance."""
        bias = None if self.bias is None else self.bias[rows]
        keys, values = (tuple(x[rows] for x in pair) for pair in (self.keys, self.values))
        return TextContext(keys=keys, values=values, bias=bias)


def skip_sparse_attention(q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, key_bias: Tensor | None) -> Tensor:
    """Self-attention over whole sequences, any number of heads: the default `Attend`.

    Args:
        q, k, v: [B, S, N, D]; their softmax scale is D**-0.5.
        sparse: which tokens meet; the sequence is filled up with zeros to whole groups.
        key_bias: [B, S] to add to the logits of each key, None for none.
    Returns:
        [B, S, N, D].
    Source: Skiparse attention, arXiv 2412.00131, section on the denoiser.
    """
    B, S, _, _ = q.shape
    fill = sparse.padded(S) - S
    if fill:
        if key_bias is None:
            key_bias = q.new_zeros(B, S)
        key_bias = F.pad(key_bias, (0, fill), value=PADDED)
    q, k, v = (to_groups(x, sparse).transpose(1, 2) for x in (q, k, v))  # [G*B, N, S/G, D]
    mask = None
    if key_bias is not None:
        mask = to_groups(key_bias[:, :, None, None], sparse).squeeze(3).transpose(1, 2)[:, :, None].to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return from_groups(out.transpose(1, 2), sparse, S)


def to_groups(x: Tensor, sparse: SkipSparse) -> Tensor:
    """Sort the tokens of [B, S, N, D] into their groups: [G*B, S'/G, N, D], group-major, zeros filled in at the end."""
    if sparse.kind == "dense":
        return x
    B, S, N, D = x.shape
    k = sparse.k
    x = F.pad(x, (0, 0, 0, 0, 0, sparse.padded(S) - S))
    if sparse.kind == "single":
        x = x.view(B, -1, k, N, D).permute(2, 0, 1, 3, 4)  # n = j * k + g
    else:
        x = x.view(B, -1, k, k, N, D).permute(2, 0, 1, 3, 4, 5)  # n = (j div k) * k * k + g * k + j mod k
    return x.reshape(k * B, -1, N, D)


def from_groups(x: Tensor, sparse: SkipSparse, tokens: int) -> Tensor:
    """The inverse of `to_groups`: [G*B, S'/G, N, D] to [B, `tokens`, N, D]."""
    if sparse.kind == "dense":
        return x
    k = sparse.k
    N, D = x.shape[2:]
    if sparse.kind == "single":
        x = x.unflatten(0, (k, -1)).permute(1, 2, 0, 3, 4)
    else:
        x = x.unflatten(0, (k, -1)).unflatten(2, (-1, k)).permute(1, 2, 0, 3, 4, 5)
    return x.reshape(x.shape[0], -1, N, D)[:, :tokens]


class OpenSoraPlanTransformer3DModel(ModelMixin, ConfigMixin, AttentionMixin):
    """Predicts v of noisy latents [B, C, T', H', W'] under a prompt.

    The arguments are the keys of upstream's config.json, with the values of the released 2B model as defaults.
    `sample_size_*` inform only and may be numbers or pairs. `vae_scale_factor_t` stands in the configs of the
    image-to-video and inpainting models alone: it adds the embeddings of the masked video and of the mask, which are
    summed with that of the noisy latents; everything else is the same.

    Raises:
        ValueError: a configuration that upstream cannot run either, or that was never released.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = ["OpenSoraPlanBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["OpenSoraPlanBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm", "adaln_single"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 24,
        attention_head_dim: int = 96,
        in_channels: int = 8,
        out_channels: int = 8,
        num_layers: int = 32,
        dropout: float = 0.0,
        cross_attention_dim: int = 2304,
        attention_bias: bool = True,
        sample_size_h: int | Sequence[int] | None = None,
        sample_size_w: int | Sequence[int] | None = None,
        sample_size_t: int | None = None,
        patch_size: int = 2,
        patch_size_t: int = 1,
        activation_fn: str = "gelu-approximate",
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        interpolation_scale_h: float = 1.0,
        interpolation_scale_w: float = 1.0,
        interpolation_scale_t: float = 1.0,
        sparse1d: bool = True,
        sparse_n: int = 4,
        vae_scale_factor_t: int | None = None,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        if attention_head_dim % 6:
            near = max(6, round(attention_head_dim / 6) * 6)
            raise ValueError(f"attention_head_dim={attention_head_dim} must be a multiple of 6, nearest is {near}")
        if cross_attention_dim != width:
            raise ValueError(
                f"cross_attention_dim={cross_attention_dim} must be num_attention_heads * attention_head_dim = "
                f"{width}, the width that the text is projected to"
            )
        if patch_size_t != 1:
            raise ValueError(f"patch_size_t={patch_size_t} is not built here, the only one is 1")
        if (sparse1d, sparse_n) != (True, 4) and sparse_n != 1:
            raise ValueError(
                f"sparse_n={sparse_n} with sparse1d={sparse1d} has no model: must be 4 with sparse1d=True, or 1"
            )
        for name in ("only_cross_attention", "double_self_attention", "upcast_attention"):
            if self.config[name]:
                raise ValueError(f"{name}=True is not built here, the only value is False")

        self.pos_embed = PatchEmbed(in_channels, width, patch_size)
        if vae_scale_factor_t is not None:
            self.pos_embed_masked_hidden_states = nn.Sequential(
                PatchEmbed(in_channels, width, patch_size), nn.Linear(width, width, bias=False)
            )
            self.pos_embed_mask = nn.Sequential(
                PatchEmbed(vae_scale_factor_t, width, patch_size), nn.Linear(width, width, bias=False)
            )
        self.rotary = Rotary3D(
            attention_head_dim, scales=(interpolation_scale_t, interpolation_scale_h, interpolation_scale_w)
        )
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=width)
        self.adaln_single = AdaLayerNormSingle(width)
        self.transformer_blocks = nn.ModuleList(
            OpenSoraPlanBlock(
                num_heads=num_attention_heads,
                head_dim=attention_head_dim,
                sparse=block_sparsity(i, sparse1d, sparse_n),
                attention_bias=attention_bias,
                activation_fn=activation_fn,
                dropout=dropout,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            for i in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, patch_size_t * patch_size * patch_size * out_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of `hidden_states`: the noisy latents; for inpainting also the masked latents and the mask."""
        mask = self.config.vae_scale_factor_t
        return self.config.in_channels if mask is None else 2 * self.config.in_channels + mask

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        text: TextContext | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict v.

        Args:
            hidden_states: noisy latents [B, C, T', H', W'], scaled by the scheduler; H' and W' even. The inpainting
                model wants the latents of the masked video and the mask (a channel for each pixel frame that a latent
                frame covers) behind them on the channel axis.
            timestep: [B] or a scalar, fp32 (bf16 rounds most timesteps).
            encoder_hidden_states: embedded prompts [B, 1, L, caption_channels].
            attention_mask: [B, T', H', W'], 0 where a latent pixel is to be ignored; None keeps all.
            encoder_attention_mask: [B, 1, L], 0 where a text token is to be ignored; None keeps all.
            text: what `encode_text` made of the prompts, instead of the two above.
            return_dict: whether to wrap the result as `.sample` or to return it in a tuple.
        Returns:
            [B, C, T', H', W'] in the dtype of `hidden_states`.
        Raises:
            ValueError: a shape that does not fit; odd sizes, which would be cut off silently.
        """
        self._check(hidden_states, timestep, attention_mask)
        B, _, frames, rows, cols = hidden_states.shape
        patch = self.config.patch_size
        if text is None:
            if encoder_hidden_states is None:
                raise ValueError("encoder_hidden_states=None needs text, the result of encode_text")
            text = self.encode_text(encoder_hidden_states, encoder_attention_mask)
        if text.keys[0].shape[0] != B:
            raise ValueError(
                f"hidden_states has a batch of {B}, the text one of {text.keys[0].shape[0]}: must be equal"
            )

        modulation, embedded = self.adaln_single(timestep.float().expand(B), hidden_dtype=hidden_states.dtype)
        modulation = modulation.unflatten(1, (6, -1))  # [B, 6, N*D]
        rope = self.rotary(frames, rows // patch, cols // patch, device=hidden_states.device)
        key_bias = None if attention_mask is None else video_bias(attention_mask, patch)
        x = self.embed(hidden_states)
        for i, block in enumerate(self.transformer_blocks):
            x = block(x, modulation, rope, (text.keys[i], text.values[i]), key_bias, text.bias)

        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        x = x.view(B, frames, rows // patch, cols // patch, patch, patch, -1)
        sample = x.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, frames, rows, cols)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def embed(self, hidden_states: Tensor) -> Tensor:
        """Tokens [B, S, N*D] of what `forward` takes."""
        mask = self.config.vae_scale_factor_t
        if mask is None:
            return self.pos_embed(hidden_states)
        C = self.config.in_channels
        noisy, masked_video, pixels = hidden_states.split((C, C, mask), dim=1)
        x = self.pos_embed(noisy)
        return x + self.pos_embed_masked_hidden_states(masked_video) + self.pos_embed_mask(pixels)

    def encode_text(self, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None) -> TextContext:
        """Project the prompts once for all steps: keys and values of each block's cross-attention.

        Args:
            encoder_hidden_states: [B, 1, L, caption_channels].
            encoder_attention_mask: [B, 1, L], 0 where a text token is to be ignored; None keeps all.
        Raises:
            ValueError: a shape that does not fit.
        """
        shape = tuple(encoder_hidden_states.shape)
        if len(shape) != 4 or shape[1] != 1 or shape[3] != self.config.caption_channels:
            raise ValueError(f"encoder_hidden_states {list(shape)} must be [B, 1, L, {self.config.caption_channels}]")
        bias = None
        if encoder_attention_mask is not None:
            if tuple(encoder_attention_mask.shape) != shape[:3]:
                raise ValueError(
                    f"encoder_attention_mask {list(encoder_attention_mask.shape)} must be {list(shape[:3])}"
                )
            bias = (1 - encoder_attention_mask[:, 0].to(encoder_hidden_states.dtype)) * MASKED
        projected = self.caption_projection(encoder_hidden_states[:, 0])
        pairs = [block.text_keys_values(projected) for block in self.blocks()]
        return TextContext(keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs), bias=bias)

    def blocks(self) -> list["OpenSoraPlanBlock"]:
        """`transformer_blocks` by their type."""
        blocks = list(self.transformer_blocks)
        assert all(isinstance(block, OpenSoraPlanBlock) for block in blocks)
        return cast(list[OpenSoraPlanBlock], blocks)

    def _check(self, hidden_states: Tensor, timestep: Tensor, attention_mask: Tensor | None) -> None:
        shape = tuple(hidden_states.shape)
        if len(shape) != 5 or shape[1] != self.latent_channels or 0 in shape:
            raise ValueError(f"hidden_states {list(shape)} must be [B, {self.latent_channels}, T', H', W']")
        patch = self.config.patch_size
        for name, value in (("rows", shape[3]), ("cols", shape[4])):
            if value % patch:
                near = max(patch, (value + patch // 2) // patch * patch)
                raise ValueError(f"hidden_states has {value} {name}, must be a multiple of {patch}, nearest is {near}")
        if timestep.ndim > 1 or timestep.numel() not in (1, shape[0]):
            raise ValueError(f"timestep {list(timestep.shape)} must be a scalar or [{shape[0]}]")
        want = (shape[0], *shape[2:])
        if attention_mask is not None and tuple(attention_mask.shape) != want:
            raise ValueError(f"attention_mask {list(attention_mask.shape)} must be {list(want)}")


class OpenSoraPlanBlock(nn.Module):
    """Self-attention and MLP, each modulated by the timestep, and plain cross-attention to the text between them."""

    def __init__(
        self,
        *,
        num_heads: int,
        head_dim: int,
        sparse: SkipSparse,
        attention_bias: bool = True,
        activation_fn: str = "gelu-approximate",
        dropout: float = 0.0,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.sparse = sparse
        self.norm1 = nn.LayerNorm(width, elementwise_affine=norm_elementwise_affine, eps=norm_eps)
        self.attn1 = Attention(
            query_dim=width,
            heads=num_heads,
            dim_head=head_dim,
            dropout=dropout,
            bias=attention_bias,
            processor=SelfAttnProcessor(sparse, skip_sparse_attention),
        )
        self.attn2 = Attention(
            query_dim=width,
            cross_attention_dim=width,
            heads=num_heads,
            dim_head=head_dim,
            dropout=dropout,
            bias=attention_bias,
            processor=CrossAttnProcessor(),
        )
        self.norm2 = nn.LayerNorm(width, elementwise_affine=norm_elementwise_affine, eps=norm_eps)
        self.ff = FeedForward(width, dropout=dropout, activation_fn=activation_fn)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor],
        key_bias: Tensor | None = None,
        text_bias: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, S, N*D] to tokens.

        Args:
            x: the tokens that this rank owns.
            modulation: [B, 6, N*D], the same for all blocks: shift, scale, gate of the attention, then of the MLP.
            rope: cos and sin [S, D] of these tokens.
            text: keys and values [B, L, N, D] of this block, from `text_keys_values`.
            key_bias: [B, S of all ranks] for the self-attention, None for none.
            text_bias: [B, L] for the cross-attention, None for none.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(y, attention_mask=key_bias, image_rotary_emb=rope)
        x = x + self.attn2(x, attention_mask=text_bias, key_value=text)
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.ff(y)

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, N, D] of projected text [B, L, N*D]."""
        return _heads(self.attn2.to_k(text), self.attn2), _heads(self.attn2.to_v(text), self.attn2)


class SelfAttnProcessor:
    """Projects tokens to q, k, v, rotates q and k, and leaves the rest to `attend`."""

    def __init__(self, sparse: SkipSparse, attend: Attend) -> None:
        self.sparse = sparse
        self.attend = attend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, S, N*D] to the same; `attention_mask` is the key bias, `image_rotary_emb` cos and sin [S, D]."""
        q, k, v = (_heads(layer(hidden_states), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if image_rotary_emb is not None:
            q = rotate(q, *image_rotary_emb)  # one after the other: the fp32 copies are large
            k = rotate(k, *image_rotary_emb)
        out = self.attend(q, k, v, sparse=self.sparse, key_bias=attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class CrossAttnProcessor:
    """Attention of tokens to text whose keys and values are given; nothing here needs the tokens of other ranks."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_value: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, S, N*D] to the same; `key_value` [B, L, N, D] each, `attention_mask` the bias [B, L] of the text."""
        assert key_value is not None
        q = _heads(attn.to_q(hidden_states), attn)
        q, k, v = (x.transpose(1, 2) for x in (q, *key_value))  # [B, N, S or L, D]
        mask = None if attention_mask is None else attention_mask[:, None, None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class PatchEmbed(nn.Module):
    """Each patch of each latent frame to a token: [B, C, T', H', W'] to [B, S, width], without positions."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.proj(latents.transpose(1, 2).flatten(0, 1))  # [B*T', width, H'/2, W'/2]
        return x.flatten(2).transpose(1, 2).unflatten(0, (latents.shape[0], -1)).flatten(1, 2)


class Rotary3D(nn.Module):
    """Rotation angles of each token from its frame, row and col; a third of the head dim for each.

    Source: RoFormer (arXiv 2104.09864), one axis after the other along the head dim, rotate-half layout in each third.
    """

    def __init__(self, head_dim: int, scales: tuple[float, float, float]) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.scales = scales

    def forward(self, frames: int, rows: int, cols: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [S, D] in fp32 for tokens in the order frame, row, col."""
        third = self.head_dim // 3
        exponents = torch.arange(0, third, 2, dtype=torch.float32, device=device) / third
        frequencies = 10000.0**-exponents
        thirds = []
        for axis, (count, scale) in enumerate(zip((frames, rows, cols), self.scales, strict=True)):
            positions = torch.arange(count, dtype=torch.float32, device=device) / scale
            angles = torch.outer(positions, frequencies).repeat(1, 2)  # both halves of the third turn alike
            shape = [1, 1, 1, third]
            shape[axis] = count
            thirds.append(angles.view(shape).expand(frames, rows, cols, third))
        angles = torch.cat(thirds, dim=-1).flatten(0, 2)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate q or k [B, S, N, D] by the angles of its tokens, cos and sin [S, D], computed in fp32."""
    cos, sin = (table.unflatten(-1, (3, 2, -1))[:, None, :, 0] for table in (cos, sin))  # [S, 1, 3, D/6]
    low, high = x.unflatten(-1, (3, 2, -1)).unbind(-2)  # [B, S, N, 3, D/6]
    turned_low = (low * cos - high * sin).to(x.dtype)
    turned_high = (high * cos + low * sin).to(x.dtype)
    return torch.stack((turned_low, turned_high), dim=-2).flatten(-3)


def video_bias(attention_mask: Tensor, patch_size: int) -> Tensor | None:
    """The bias [B, S] of each video token from a mask of latent pixels [B, T', H', W'], None if it ignores none.

    A token is kept where any of its pixels is.
    """
    pooled = F.max_pool2d((attention_mask != 0).float(), patch_size)  # frames act as channels
    keep = pooled.flatten(1)
    return None if bool(keep.all()) else (1 - keep) * MASKED


def _heads(x: Tensor, attn: Attention) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))  # [B, S, N*D] -> [B, S, N, D]
