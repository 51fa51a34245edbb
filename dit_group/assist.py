"""What a lent rank does in a denoising step: its share of the heads in every attention layer, without any weights.

Source: attention co-processing (Aco) of PipeDiT (arXiv 2511.12056). A helper is a member of the exchange that owns no
tokens and some heads; it makes the same calls as the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_group.attention import Layout, SequenceParallel


class Assistant:
    """Holds the sizes of the requests that may want help.

    Args:
        parallel: this rank's view of the DiT group, as a helper.
        attention_layers: attention layers of one evaluation of the DiT.
        head_dim, dtype, device: of the activations.
    """

    def __init__(
        self,
        parallel: SequenceParallel,
        *,
        attention_layers: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._parallel = parallel
        self._attention_layers = attention_layers
        self._nothing = torch.empty((1, 0, parallel.num_heads, head_dim), dtype=dtype, device=device)
        self._requests: dict[str, tuple[int, list[Tensor]]] = {}
        self._layouts: dict[tuple[str, tuple[int, ...]], list[Layout]] = {}

    def prepare(self, request: str, num_video: int, text_masks: Sequence[Tensor]) -> None:
        """Steps of this request may want help.

        Args:
            num_video: video tokens.
            text_masks: bool [1, L] for each evaluation of the DiT in a step, as the DiT ranks lay out their text.
        """
        self._requests[request] = (num_video, list(text_masks))

    @torch.no_grad()
    def step(self, request: str, helpers: tuple[int, ...]) -> None:
        """Take part in every attention layer of one step."""
        layouts = self._layouts.get((request, helpers))
        if layouts is None:
            num_video, masks = self._requests[request]
            layouts = [self._parallel.lay_out(num_video, mask.shape[1], mask, helpers) for mask in masks]
            self._layouts[request, helpers] = layouts
        for layout in layouts:
            for _ in range(self._attention_layers):
                call = layout.attention.begin()
                call.value(self._nothing)
                call.key(self._nothing)
                call.query(self._nothing)
                call.attend()
                call.output()

    def forget(self, request: str) -> None:
        """No step of this request will come any more."""
        self._requests.pop(request, None)
        for key in [key for key in self._layouts if key[0] == request]:
            del self._layouts[key]
