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
    """

    def __init__(
        self, predict: Predict, advance: Advance, latents: Tensor, timesteps: Sequence[Tensor] | Tensor
    ) -> None:
        self._predict = predict
        self._advance = advance
        self._timesteps = timesteps
        self.latents = latents
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
        self.latents = self._advance(self._predict(self.latents, timestep), timestep, self.latents)
        self.next_step += 1


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Initial noise of one request: float32 from a CPU generator of its own, the same whatever the ranks."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
