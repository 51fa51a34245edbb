"""The object a user holds: diffusers' call and names, a batch iterator, and ranks that always end with it."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, Finished, FramesListener, Job
from pipelines.checkpoint import open_checkpoint
from pipelines.checks import check_request
from pipelines.engine import Engine, Progress
from pipelines.families import ModelFacts, load_family
from pipelines.launch import LocalLauncher
from pipelines.start import Torchrun, check_attention, check_devices, resolve_device, start_engine
from videopipe.config import Config, ConfigError, check_config, load_config
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest, default_id
from videopipe.rendering import RenderResult, check_output
from videopipe.trace import ENGINE_RANK, SpanRecorder, Trace

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[[Any, int, int, dict[str, Any]], Any]

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass
class VideoPipelineOutput:
    """What a call returns: `frames[i]` is clip i in the asked `output_type`, as diffusers' pipelines return it."""

    frames: Any

    def __getitem__(self, index: int) -> Any:
        return (self.frames,)[index]


class VideoPipeline:
    """Renders video on a DiT group and a VAE group; subclasses name the model family.

    Use it as a context manager, or call `close`: the ranks end with it. They end as well when this process dies.
    """

    family: ClassVar[str]

    def __init__(self, engine: Engine, config: Config, facts: ModelFacts) -> None:
        self._engine = engine
        self._config = config
        self._facts = facts
        self._family = load_family(config.model.family)
        self._calls = 0
        self._finalizer = weakref.finalize(self, engine.close)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        config: str | Path | Mapping[str, Any] | Config | None = None,
        overrides: Iterable[str] = (),
        torch_dtype: torch.dtype | None = None,
        dit_ranks: int | None = None,
        vae_ranks: int | None = None,
        revision: str | None = None,
        progress: Progress | None = None,
        launcher: LocalLauncher | None = None,
    ) -> Self:
        """Start the ranks and load each one's parts; returns when all are ready.

        In a plain script or a notebook this starts the ranks as processes of this host. Under torchrun every process
        calls it: it returns in rank 0 only, the others serve until rank 0 closes its pipeline and then exit.

        Args:
            pretrained_model_name_or_path: checkpoint directory or hub id in diffusers layout; `model.weights` of the
                configuration where None.
            config: TOML file, mapping, or `videopipe.config.Config`; the defaults are one DiT and one VAE rank. With
                no configuration, or a mapping that names no `model.family`, it is that of this class.
            overrides: `path=value` strings, which win over the file; the other arguments win over them.
            torch_dtype: precision of all parts, as diffusers' argument of that name.
            dit_ranks, vae_ranks: group sizes; `vae_ranks=0` decodes on the DiT ranks.
            progress: is told of loads, stages and steps.
            launcher: starts the ranks; give the same to several pipelines, and its imports need not run again.
        Raises:
            ConfigError: the configuration cannot run, before any weight is read.
            CheckpointError: no checkpoint of this family at that place.
            RankError: a rank did not come up.
        """
        changes = list(overrides)
        if not _has_family(config):
            changes.insert(0, f"model.family={cls.family}")
        for path, value in (
            ("model.weights", None if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)),
            ("model.revision", revision),
            ("model.dtype", None if torch_dtype is None else _dtype_name(torch_dtype)),
            ("groups.dit_ranks", dit_ranks),
            ("groups.vae_ranks", vae_ranks),
        ):
            if value is not None:
                changes.append(f"{path}={msgspec.json.encode(value).decode()}")
        source: str | Path | Mapping[str, Any] | None
        if isinstance(config, Config):
            source = _without_none(msgspec.to_builtins(config))
        else:
            source = _without_none(config) if isinstance(config, Mapping) else config
        resolved = load_config(source, changes)
        if resolved.model.family != cls.family:
            raise ConfigError(
                f"model.family={resolved.model.family!r} is not what {cls.__name__} renders, nearest is {cls.family!r}"
            )
        return cls.start(resolved, progress=progress, launcher=launcher)

    @classmethod
    def start(cls, config: Config, *, progress: Progress | None = None, launcher: LocalLauncher | None = None) -> Self:
        """As `from_pretrained`, from a resolved configuration."""
        check_config(config)
        checkpoint = open_checkpoint(config.model)
        torchrun = Torchrun.detect()
        if torchrun is not None and torchrun.rank != 0:
            sys.exit(torchrun.serve())
        family = load_family(config.model.family)
        family.check_config(config)
        facts = family.facts(checkpoint)
        device = resolve_device(config)
        check_devices(config, device, torchrun.world_size if torchrun else None)
        check_attention(config, facts, device)
        engine = start_engine(config, facts, device, torchrun, progress, launcher)
        return cls(engine, config, facts)

    # -- rendering

    def render(
        self,
        requests: Iterable[VideoRequest | str],
        *,
        save_to: str | Path | None = None,
        record_to: str | Path | None = None,
        on_frames: FramesListener | None = None,
    ) -> Iterator[RenderResult]:
        """Render many requests; yields each clip as it finishes, which need not be in the order of the requests.

        A plain string is a prompt with the configuration's sizes, and the seed `request.seed` + its index. While the
        caller works on a clip, the ranks go on, until `queue.max_undelivered` finished clips wait. Leaving the
        iteration early cancels what has not been rendered.

        Args:
            save_to: a directory for `<id>.<ext>` and `<id>.json`, as `RenderResult.save_to` writes them. Frames then go
                from the decoding rank to a writer process, and encoding overlaps with rendering; a slow disk holds the
                ranks back. A result comes when its clip is on disk, with `path` in place of frames. One that cannot
                be written has `error` instead, its latents are kept, and the others go on.
            record_to: a directory for `<id>.steps/`, the tensors of every denoising step as `videopipe compare` reads
                them, with `output.record_blocks` blocks. Earlier recordings of the same ids are replaced.
            on_frames: called as (request id, first frame, frames [t, H, W, 3]) for the frames of every clip as they
                are decoded, before the clip is yielded, see `pipelines.batch.FramesListener`; with `decode.mode`
                "stream" or "tiles" the first come while others are being decoded.
        Raises:
            ValueError: a request that this model cannot render, an id twice, or a configuration that records without
                a directory to record to; before anything is rendered.
            OSError: the directory cannot be made.
            RankError: a rank was lost; the pipeline cannot be used any more, clips already given out are not touched.
        """
        checked = self._checked(requests)
        if save_to is not None:
            for request in checked:
                check_output(self._config.output, request.spec, f"{request.id}: ")
            Path(save_to).mkdir(parents=True, exist_ok=True)
        if record_to is None:
            self._check_recording()
        jobs = [
            Job(
                request=request,
                result=self._result_kind(),
                record_to=None if record_to is None else Path(record_to) / f"{request.id}.steps",
                save_to=None if save_to is None else Path(save_to),
            )
            for request in checked
        ]
        batch = self._engine.submit(jobs, on_frames)
        results = self._results(batch)
        weakref.finalize(results, batch.abandon).atexit = False  # a generator that never began runs no `finally`
        return results

    def _results(self, batch: Batch) -> Iterator[RenderResult]:
        for finished in batch:
            yield self._result(finished)

    def _result(self, finished: Finished) -> RenderResult:
        job, failure = finished.job, finished.failure
        latents = job.result == "latents" or failure is not None
        result = RenderResult(
            request_id=job.request.id,
            frames=None if latents else finished.array,
            latents=torch.from_numpy(finished.array) if latents and finished.array is not None else None,
            side_car=finished.side_car,
            output=self._config.output,
            path=None if finished.path is None else _in(job.save_to, finished.path),
        )
        if failure is not None:
            return result.rescued(_in(job.save_to, failure.path), failure.cause)
        if latents and job.save_to is not None:  # they are small: no writer is asked
            recorder = SpanRecorder(ENGINE_RANK)
            with recorder.span("write", request=job.request.id):
                result = result.saved_to(job.save_to)
            self.trace.add(recorder.drain())
        return result

    def _check_recording(self) -> None:
        """Refuse to leave out a recording that the configuration asks for."""
        out = self._config.output
        if out.records_steps:
            raise ValueError(
                f"output.record_latents={out.record_latents} and output.record_blocks={out.record_blocks} need a "
                "directory, nearest is render(..., record_to='out')"
            )

    def _result_kind(self) -> Literal["uint8", "latents"]:
        return "latents" if self._config.output.format == "latent" else "uint8"

    def _checked(self, requests: Iterable[VideoRequest | str]) -> list[VideoRequest]:
        r = self._config.request
        checked: list[VideoRequest] = []
        for index, request in enumerate(requests):
            if isinstance(request, str):
                request = VideoRequest(
                    id=default_id(index, request, r.seed + index),
                    prompt=request,
                    negative_prompt=r.negative_prompt,
                    spec=self._config.spec(),
                    num_inference_steps=r.num_inference_steps,
                    guidance_scale=r.guidance_scale,
                    true_cfg_scale=r.true_cfg_scale,
                    seed=r.seed + index,
                    max_sequence_length=r.max_sequence_length,
                )
            self.check_request(request, f"requests[{index}].")
            checked.append(request)
        return checked

    def check_request(self, request: VideoRequest, where: str = "", text_tokens: int | None = None) -> None:
        """Refuse a request that this model, or this layout of it, cannot render.

        Args:
            text_tokens: of conditioning that is given in place of a prompt.
        Raises:
            ValueError: names the field, the value and the nearest valid value.
        """
        check_request(self._family, self._config, self._facts, request, where, text_tokens)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        true_cfg_scale: float | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        max_sequence_length: int | None = None,
    ) -> VideoPipelineOutput | tuple[Any]:
        """Render one prompt, or a list of them, with diffusers' arguments; those left out come from the configuration.

        Args:
            generator: draws the noise exactly as diffusers draws it; or give `seed`, one clip after the other getting
                seed, seed + 1, ...; with neither, the configuration's seed.
            latents: noise to start from, float32 [B, C, T', H', W'].
            prompt_embeds, pooled_prompt_embeds, prompt_attention_mask: conditioning in place of `prompt`; likewise
                `negative_*`.
            output_type: "pil" list of lists of images, "np" float32 [B, T, H, W, 3] in 0..1, "pt" float32
                [B, T, 3, H, W], "latent" float32 [B, C, T', H', W'] (not divided by the scaling factor).
            callback_on_step_end: called as (pipeline, step, timestep index, {}) for each completed step, from the
                engine's thread; tensors stay on the ranks.
        Returns:
            `frames` as described, in an object, or in a tuple with return_dict=False.
        Raises:
            ValueError: names the argument, the value and the nearest valid value, before anything is rendered.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent', nearest is 'np'")
        self._check_recording()
        if prompt_2 is not None:
            raise ValueError(f"prompt_2={prompt_2!r}: `prompt` goes to every text encoder, nearest is None")
        if generator is not None and seed is not None:
            raise ValueError(f"seed={seed} and generator cannot both be given, nearest is one of them")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("prompt and prompt_embeds: give one of them, not both")
        tensors = {
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        given = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}
        self._check_given(given)
        r = self._config.request
        if prompt_embeds is not None:
            prompts = [""] * prompt_embeds.shape[0]
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        negative = negative_prompt if negative_prompt is not None else r.negative_prompt
        if negative is None and "negative_prompt_embeds" in given:
            negative = ""
        negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise ValueError(
                f"negative_prompt has {len(negatives)} entries for {len(prompts)} prompts, nearest is {len(prompts)}"
            )
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt={num_videos_per_prompt} must be at least 1, nearest is 1")
        spec = VideoSpec(
            height=r.height if height is None else height,
            width=r.width if width is None else width,
            num_frames=r.num_frames if num_frames is None else num_frames,
            fps=self._config.output.fps,
        )
        self._calls += 1
        count = len(prompts) * num_videos_per_prompt
        first_seed = r.seed if seed is None else seed
        requests = [
            VideoRequest(
                id=f"call{self._calls}-{index}",
                prompt=prompts[index // num_videos_per_prompt],
                negative_prompt=negatives[index // num_videos_per_prompt],
                spec=spec,
                num_inference_steps=r.num_inference_steps if num_inference_steps is None else num_inference_steps,
                guidance_scale=r.guidance_scale if guidance_scale is None else guidance_scale,
                true_cfg_scale=r.true_cfg_scale if true_cfg_scale is None else true_cfg_scale,
                seed=first_seed + index,
                max_sequence_length=r.max_sequence_length if max_sequence_length is None else max_sequence_length,
            )
            for index in range(count)
        ]
        for request in requests:
            for name in ("prompt_embeds", "negative_prompt_embeds"):
                if name == "prompt_embeds" or request.negative_prompt is not None:
                    self.check_request(request, text_tokens=given[name].shape[1] if name in given else None)
        noise = self._noise(requests, generator, latents)
        kinds: dict[OutputType, Literal["uint8", "float32", "latents"]] = {"pil": "uint8", "latent": "latents"}
        jobs = [
            Job(
                request=request,
                result=kinds.get(output_type, "float32"),
                noise=None if noise is None else noise[index : index + 1],
                conditioning=_row(given, index // num_videos_per_prompt),
            )
            for index, request in enumerate(requests)
        ]
        arrays: dict[str, NDArray[Any]] = {}
        with self._engine.listening(self._step_notifier(callback_on_step_end, requests)):
            for finished in self._engine.submit(jobs):
                arrays[finished.job.request.id] = finished.array
        frames = _assemble([arrays[request.id] for request in requests], output_type)
        return VideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _step_notifier(
        self, callback: StepCallback | None, requests: list[VideoRequest]
    ) -> Callable[[str, int], None] | None:
        if callback is None:
            return None
        mine = {request.id for request in requests}

        def notify(request: str, step: int) -> None:
            if request in mine:
                callback(self, step, step, {})

        return notify

    def _check_given(self, given: Mapping[str, Tensor]) -> None:
        """Refuse conditioning in place of a prompt that is incomplete."""
        for prefix in ("", "negative_"):
            names = [prefix + name for name in ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")]
            present = [name for name in names if name in given]
            if present and len(present) < 3:
                missing = [name for name in names if name not in given]
                raise ValueError(f"{present[0]} is given without {' and '.join(missing)}: give all three or none")

    def _noise(
        self,
        requests: list[VideoRequest],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor | None:
        """Noise [B, C, T', H', W'] from what the caller gave, drawn as diffusers draws it; None to draw from seeds."""
        shape = (len(requests), *self._facts.geometry.latent_shape(requests[0].spec)[1:])
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents has shape {tuple(latents.shape)}, nearest is {shape}")
            return latents.detach().to("cpu", torch.float32)
        if generator is None:
            return None
        if isinstance(generator, torch.Generator):
            return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).cpu()
        generators = list(generator)
        if len(generators) != len(requests):
            raise ValueError(
                f"generator has {len(generators)} entries for {len(requests)} clips, nearest is {len(requests)}"
            )
        one = (1, *shape[1:])
        return torch.cat(
            [torch.randn(one, generator=g, device=g.device, dtype=torch.float32).cpu() for g in generators]
        )

    # -- the run

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self._config

    @property
    def facts(self) -> ModelFacts:
        """Sizes of the model."""
        return self._facts

    @property
    def engine(self) -> Engine:
        """The engine: process ids, memory and weights by rank."""
        return self._engine

    @property
    def trace(self) -> Trace:
        """What every rank did when."""
        return self._engine.trace

    def close(self) -> None:
        """End the ranks."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _DTYPE_NAMES:
        names = ", ".join(_DTYPE_NAMES.values())
        raise ConfigError(f"torch_dtype={dtype} must be one of {names}; nearest is 'float32'")
    return _DTYPE_NAMES[dtype]


def _has_family(config: str | Path | Mapping[str, Any] | Config | None) -> bool:
    """Whether a configuration says which family it is for: files and complete ones always do, by default if need be."""
    if isinstance(config, Mapping):
        model = config.get("model")
        return isinstance(model, Mapping) and "family" in model
    return config is not None


def _without_none(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, Mapping) else v for k, v in data.items() if v is not None}


def _row(given: Mapping[str, Tensor], index: int) -> dict[str, Tensor] | None:
    return {name: tensor[index : index + 1] for name, tensor in given.items()} or None


def _in(directory: Path | None, path: str) -> Path:
    """The absolute path of a file in `directory` as the caller has named it."""
    assert directory is not None, path
    return directory / Path(path).name


def _assemble(arrays: list[NDArray[Any]], output_type: OutputType) -> Any:
    if output_type == "latent":
        return torch.from_numpy(np.concatenate(arrays))
    if output_type == "np":
        return np.stack(arrays)
    if output_type == "pt":
        return torch.from_numpy(np.stack(arrays)).permute(0, 1, 4, 2, 3).contiguous()
    from PIL import Image

    return [[Image.fromarray(frame) for frame in array] for array in arrays]
