"""The denoising loop, one step at a time: it takes `predict` and `advance` and knows nothing else."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
Advance = Callable[[Tensor, Tensor, Tensor], Tensor]


class Denoising:
    """The state of one request between its steps.

    Args:
        predict: (latents, timestep) -> the model's prediction, guidance included; both [B, C, T', H', W'].
        advance: (prediction, timestep, latents) -> the next latents: the scheduler's update.
        latents: the initial noise, float32.
        timesteps: one entry for each step, on the device.
        gather: makes latents whole of which each member of a group has the tokens that it owns; None where they are
            whole already.
    """

    def __init__(
        self,
        predict: Predict,
        advance: Advance,
        latents: Tensor,
        timesteps: Sequence[Tensor] | Tensor,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._predict = predict
        self._advance = advance
        self._timesteps = timesteps
        self._gather = gather
        self._latents = latents
        self.next_step = 0

    @property
    def num_steps(self) -> int:
        """Steps of the whole request."""
        return len(self._timesteps)

    @torch.no_grad()
    def step(self, index: int) -> None:
        """Run step `index`; steps come in order, each once."""
        assert index == self.next_step < self.num_steps, (index, self.next_step, self.num_steps)
        timestep = self._timesteps[index]
        self._latents = self._advance(self._predict(self._latents, timestep), timestep, self._latents)
        self.next_step += 1

    def latents(self) -> Tensor:
        """The whole latents after the steps so far, [B, C, T', H', W']; every member calls it, it may be collective.

        Between steps a member's latents are right in its own tokens only: an update acts on each token alone.
        """
        return self._latents if self._gather is None else self._gather(self._latents)


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Initial noise of one request: float32 from a CPU generator of its own, the same whatever the ranks."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
