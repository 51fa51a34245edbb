"""The sampler of Open-Sora-Plan 1.3: Euler-ancestral steps of v-prediction from zero terminal SNR."""

import torch
from diffusers import EulerAncestralDiscreteScheduler

from pipelines.models.open_sora_plan_layout import check_steps


class ZeroSNREulerAncestralScheduler(EulerAncestralDiscreteScheduler):
    """diffusers' scheduler with exactly as many timesteps as were asked for, and never NaN.

    Its own trailing grid, a range of floats, has one timestep too many (-1) for some counts, such as 61 or 103; and
    with more than 285 steps sigma is not monotonic, because alphas_cumprod[998] is smaller than the 2**-24 that stands
    for zero at the end.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Timesteps round(1000 - i * 1000 / n) - 1 and their sigmas, fp32, then a final sigma of 0.

        Raises:
            ValueError: a number of steps outside 1 to 285.
        """
        check_steps(num_inference_steps)
        super().set_timesteps(num_inference_steps, device=device)
        self.timesteps = self.timesteps[:num_inference_steps]
        self.sigmas = torch.cat((self.sigmas[:num_inference_steps], self.sigmas.new_zeros(1)))


def make_scheduler() -> ZeroSNREulerAncestralScheduler:
    """The scheduler with the settings of the released model's sample scripts.

    Source: Common Diffusion Noise Schedules and Sample Steps are Flawed (arXiv 2305.08891) for zero terminal SNR.
    """
    return ZeroSNREulerAncestralScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
