"""What a lent rank does in a denoising step: its share of the heads in every attention layer, without any weights.

Source: attention co-processing (Aco) of PipeDiT (arXiv 2511.12056). A helper is a member of the exchange that owns no
tokens and some heads; it makes the same calls as the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_group.attention import Layout, SequenceParallel
from dit_group.call import run_call
from dit_group.kernels import Kernel
from dit_group.ping_pong import run_calls_in_turns
from videopipe.arrangement import Guidance


@dataclass(frozen=True)
class _Assisted:
    """The sizes of a request: video tokens, masks of text tokens by evaluation, rows of the batch; how it is guided.

    `recorded`: its evaluations follow each other, whatever the layout says.
    """

    num_video: int
    text_masks: list[Tensor]
    rows: int
    guidance: Guidance
    recorded: bool


class Assistant:
    """Holds the sizes of the requests that may want help.

    Args:
        parallel: this rank's view of the DiT group, as a helper.
        halves: its view of the two halves that evaluate branches of guidance side by side, where there are such.
        kernels: what computes each attention layer of one evaluation of the DiT; None for the configured kernel.
        head_dim, dtype, device: of the activations.
        branches_as_rows: a pair that does not take turns is one evaluation with twice the rows.
    """

    def __init__(
        self,
        parallel: SequenceParallel,
        *,
        kernels: Sequence[Kernel | None],
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        halves: Sequence[SequenceParallel] = (),
        branches_as_rows: bool = False,
    ) -> None:
        self.parallel = parallel
        self._halves = tuple(halves)
        self._kernels = tuple(kernels)
        self.branches_as_rows = branches_as_rows
        self._nothing = torch.empty((1, 0, parallel.num_heads, head_dim), dtype=dtype, device=device)
        self._requests: dict[str, _Assisted] = {}
        self._layouts: dict[tuple[str, tuple[int, ...]], list[Layout]] = {}

    def prepare(
        self,
        request: str,
        num_video: int,
        text_masks: Sequence[Tensor],
        rows: int = 1,
        guidance: Guidance = "none",
        recorded: bool = False,
    ) -> None:
        """Steps of this request may want help.

        Args:
            num_video: video tokens.
            text_masks: bool [1, L] for each evaluation of the DiT in a step, as the DiT ranks lay out their text.
            rows: batch B of each evaluation.
            guidance: `halves`: each half of the DiT group runs one of two evaluations, at the same time; `pair`: all
                of it runs both, in turns where the layout says so.
            recorded: evaluations are recorded, and do not take turns.
        """
        assert guidance != "halves" or len(self._halves) == len(text_masks) == 2, (len(self._halves), len(text_masks))
        assert guidance != "pair" or len(text_masks) == 2, len(text_masks)
        self._requests[request] = _Assisted(num_video, list(text_masks), rows, guidance, recorded)

    @torch.no_grad()
    def step(self, request: str, helpers: tuple[int, ...]) -> None:
        """Take part in every attention layer of one step.

        Two halves of the DiT group are helped at the same time, layer by layer: what each sends is received before this
        rank attends for the one and then for the other, so that neither waits until the other has its output.
        """
        assisted = self._requests[request]
        layouts = self._layouts.get((request, helpers))
        if layouts is None:
            views = self._halves if assisted.guidance == "halves" else [self.parallel] * len(assisted.text_masks)
            layouts = [
                view.lay_out(assisted.num_video, mask.shape[1], mask, helpers, assisted.guidance)
                for view, mask in zip(views, assisted.text_masks, strict=True)
            ]
            self._layouts[request, helpers] = layouts
        nothing = self._nothing.expand(assisted.rows, -1, -1, -1)
        if assisted.guidance == "halves" or (layouts[0].in_turns and not assisted.recorded):
            first, second = (layout.attention for layout in layouts)
            for kernel in self._kernels:
                run_calls_in_turns(first.begin(kernel), second.begin(kernel), nothing)
            return
        if assisted.guidance == "pair" and self.branches_as_rows:
            layouts, nothing = layouts[:1], self._nothing.expand(2 * assisted.rows, -1, -1, -1)
        for layout in layouts:
            for kernel in self._kernels:
                run_call(layout.attention.begin(kernel), nothing, nothing, nothing)

    def views(self, guidance: Guidance) -> Sequence[SequenceParallel]:
        """Who lays out the evaluations that this rank helps."""
        return self._halves if guidance == "halves" else (self.parallel,)

    def layer(self, index: int, rows: int) -> Callable[[], object]:
        """Prepare to take part in attention layer `index` alone, in the layout then in use."""
        kernel, nothing = self._kernels[index], self._nothing.expand(rows, -1, -1, -1)
        return lambda: run_call(self.parallel.begin(kernel), nothing, nothing, nothing)

    def forget(self, request: str) -> None:
        """No step of this request will come any more."""
        self._requests.pop(request, None)
        for key in [key for key in self._layouts if key[0] == request]:
            del self._layouts[key]
