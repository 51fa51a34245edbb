"""The noise floor of a configuration: one request rendered again and again, and on other numbers of ranks."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
from rich.console import Console
from rich.table import Table

from videopipe.config import Config, ConfigError, check_config
from videopipe.quality.clips import ClipInfo, read_side_car
from videopipe.quality.compare import Comparison
from videopipe.quality.floor import NoiseFloor, floor_from, measure_floor
from videopipe.quality.terminal import number
from videopipe.records import OutputFormat, VideoRequest, default_id

if TYPE_CHECKING:
    from pipelines.launch import LocalLauncher
    from pipelines.pipeline import VideoPipeline

PROMPT = "a red fox crossing fresh snow"


class RankLayout(msgspec.Struct, frozen=True):
    """So many ranks that denoise and so many that decode, written `2+1`."""

    dit_ranks: int
    vae_ranks: int

    def __str__(self) -> str:
        return f"{self.dit_ranks}+{self.vae_ranks}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"2+1"`.

        Raises:
            ValueError: not of that form.
        """
        dit, plus, vae = text.strip().partition("+")
        if not (plus and dit.isdecimal() and vae.isdecimal() and int(dit) > 0):
            raise ValueError(f"layouts={text.strip()!r} must be DIT+VAE ranks, at least 1+0, nearest is '1+0'")
        return cls(int(dit), int(vae))


class ConfigFloor(msgspec.Struct, frozen=True, kw_only=True):
    """The noise floor of one configuration with one attention kernel.

    `rerun` among renders as configured, `floor` among all renders, those on other layouts included. `layouts` is the
    layout of each run, in order.
    """

    kernel: str
    layouts: tuple[str, ...]
    rerun: NoiseFloor
    floor: NoiseFloor

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "layouts": list(self.layouts),
            "rerun": {**msgspec.to_builtins(self.rerun), "bit_exact": self.rerun.bit_exact},
            "floor": {**msgspec.to_builtins(self.floor), "bit_exact": self.floor.bit_exact},
        }


def usual_layouts(config: Config, num_devices: int | None) -> tuple[RankLayout, ...]:
    """As configured, one rank alone, and one more DiT rank where there are devices for it; each once.

    Args:
        num_devices: GPUs of this machine, None on CPU, where ranks share the cores.
    """
    configured = layout_of(config)
    layouts = [configured, RankLayout(1, 0)]
    if num_devices is None or config.world_size + 1 <= num_devices:
        layouts.append(RankLayout(configured.dit_ranks + 1, configured.vae_ranks))
    return tuple(dict.fromkeys(layouts))


def layout_of(config: Config) -> RankLayout:
    """The layout as configured."""
    return RankLayout(config.groups.dit_ranks, config.groups.vae_ranks)


def with_layout(config: Config, layout: RankLayout, form: OutputFormat) -> Config:
    """The same configuration on another layout: what needs a VAE group goes where there is none.

    A mesh whose `ulysses_degree` does not divide the DiT ranks gets the usual degree; an odd number of them evaluates
    the branches of guidance together, and a single one without helpers one after the other.

    Steps are not recorded.

    Raises:
        ConfigError: no machine can run that.
    """
    r = msgspec.structs.replace
    changed = r(config, output=r(config.output, format=form, record_latents=False, record_blocks=0))
    if layout != layout_of(config):
        groups = r(config.groups, dit_ranks=layout.dit_ranks, vae_ranks=layout.vae_ranks)
        attention = config.attention
        if layout.vae_ranks == 0:
            groups, attention = r(groups, text_encoder="dit"), r(attention, co_processing="off")
        if layout.dit_ranks % 2:
            attention = r(attention, cfg_parallel="off")
        if layout.dit_ranks == 1 and attention.co_processing == "off":
            attention = r(attention, ping_pong="off")
        members = layout.dit_ranks // 2 if attention.cfg_parallel == "on" else layout.dit_ranks
        if attention.ulysses_degree and members % attention.ulysses_degree:
            attention = r(attention, ulysses_degree=0)
        changed = r(changed, groups=groups, attention=attention, schedule=r(config.schedule, policy="auto"))
    check_config(changed)
    return changed


def measure_config_floor(
    config: Config,
    request: VideoRequest,
    folder: Path,
    compare: Callable[[Path, Path], Comparison],
    *,
    form: OutputFormat,
    layouts: Sequence[RankLayout],
    num_runs: int = 2,
    launcher: "LocalLauncher | None" = None,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[ConfigFloor, tuple[Path, ...]]:
    """Render one request `num_runs` times as configured and once on each other layout; compare all pairs.

    Args:
        folder: where the clips go, one folder for each run.
        compare: compares two of these clips.
        form: the format they are written in.
        layouts: the configured one among them or not.
        launcher: starts the ranks, see `VideoPipeline.from_pretrained`.
        note: is told of each run before it begins.
    Returns:
        The floor, and the clips in the order of its `layouts`.
    Raises:
        ValueError: fewer than two runs, or a request or layout that cannot be rendered; before a rank is started.
        RankError: a rank was lost.
    """
    configs = floor_configs(config, request, form=form, layouts=layouts, num_runs=num_runs)
    order = [layout_of(run) for run in configs]
    pairs: dict[tuple[Path, Path], Comparison] = {}

    def compared(a: Path, b: Path) -> Comparison:
        pairs[a, b] = compare(a, b)
        return pairs[a, b]

    with _Renders(configs, request, folder, launcher) as renders:

        def render(k: int) -> Path:
            note(f"{config.model.attention_kernel}, {order[k]} ranks: run {k + 1} of {len(order)}")
            return renders.render(k)

        floor, runs = measure_floor(render, compared, len(order))
    reruns = set(runs[:num_runs])
    rerun = floor_from((found for pair, found in pairs.items() if reruns.issuperset(pair)), num_runs)
    layouts_run = tuple(str(layout) for layout in order)
    return ConfigFloor(kernel=config.model.attention_kernel, layouts=layouts_run, rerun=rerun, floor=floor), runs


def floor_configs(
    config: Config, request: VideoRequest, *, form: OutputFormat, layouts: Sequence[RankLayout], num_runs: int
) -> tuple[Config, ...]:
    """The configuration of each run of `measure_config_floor`, checked as far as can be before a rank starts.

    Raises:
        ValueError: fewer than two runs, or a request or layout that cannot be rendered.
    """
    from pipelines.checkpoint import open_checkpoint
    from pipelines.checks import check_request
    from pipelines.families import load_family
    from pipelines.start import check_attention, check_devices, resolve_device

    if num_runs < 2:
        raise ValueError(f"num_runs={num_runs} must be at least 2 to measure a noise floor, nearest is 2")
    family = load_family(config.model.family)
    facts = family.facts(open_checkpoint(config.model))
    configured = layout_of(config)
    order = [configured] * num_runs + [layout for layout in dict.fromkeys(layouts) if layout != configured]
    configs = tuple(with_layout(config, layout, form) for layout in order)
    for run in configs:
        check_request(family, run, facts, request)
        check_attention(run, facts, resolve_device(run))
        check_devices(run, resolve_device(run), None)
    return configs


class _Renders:
    """Renders run k with its own configuration; equal ones in a row share their ranks."""

    def __init__(
        self, configs: Sequence[Config], request: VideoRequest, folder: Path, launcher: "LocalLauncher | None"
    ) -> None:
        self._configs = configs
        self._request = request
        self._folder = folder
        self._launcher = launcher
        self._pipe: VideoPipeline | None = None
        self._stack = contextlib.ExitStack()

    def render(self, k: int) -> Path:
        """The clip that run k wrote."""
        from pipelines.pipeline import VideoPipeline

        if self._pipe is None or self._pipe.config != self._configs[k]:
            self._stack.close()
            self._pipe = self._stack.enter_context(VideoPipeline.start(self._configs[k], launcher=self._launcher))
        (result,) = self._pipe.render([self._request])
        return result.save_to(self._folder / f"run{k}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def request_for(config: Config, clips: Sequence[Path], prompt: str | None) -> VideoRequest:
    """The request to render: that of the clips' side-cars, or one of the configuration's sizes.

    Raises:
        ValueError: clips without side-car and no prompt, a prompt besides a side-car, or clips of different requests.
    """
    found: dict[Path, VideoRequest] = {}
    for clip in clips:
        side_car = read_side_car(clip)
        if side_car is not None and "request" in side_car:
            found[clip] = msgspec.convert(side_car["request"], VideoRequest)
    if found:
        first, *others = found.items()
        if prompt is not None:
            raise ValueError(f"prompt={prompt!r}: {first[0]} has a side-car with its request, leave --prompt out")
        for path, other in others:
            apart = _fields_apart(first[1], other)
            if apart:
                raise ValueError(f"{first[0]} and {path} are not of the same request: {apart}")
        return first[1]
    if clips and prompt is None:
        raise ValueError(
            f"{clips[0]}: no side-car tells its request, give --prompt, and --set request.seed and the like"
        )
    text, r = PROMPT if prompt is None else prompt, config.request
    request = VideoRequest(
        id=default_id(0, text, r.seed),
        prompt=text,
        negative_prompt=r.negative_prompt,
        spec=config.spec(),
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        true_cfg_scale=r.true_cfg_scale,
        seed=r.seed,
        max_sequence_length=r.max_sequence_length,
    )
    request.check()
    return request


def _fields_apart(a: VideoRequest, b: VideoRequest) -> str:
    names = [name for name in a.__struct_fields__ if name != "id" and getattr(a, name) != getattr(b, name)]
    return ", ".join(f"{name}={getattr(a, name)!r} and {getattr(b, name)!r}" for name in names)


def form_of_clip(info: ClipInfo) -> OutputFormat:
    """The format to write runs in so that they compare with a clip like with like: its losses are the floor's too."""
    if info.latents:
        return "latent"
    forms: dict[str, OutputFormat] = {"video": "mp4", "folder": "png"}
    return forms.get(info.kind, "npy")


def num_devices(config: Config) -> int | None:
    """GPUs that layouts may use; None on CPU.

    Raises:
        ConfigError: under torchrun, whose number of ranks cannot change, or CUDA asked for and absent.
    """
    import torch

    from pipelines.start import resolve_device

    if "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "a noise floor needs several numbers of ranks and torchrun fixes one: run it without torchrun"
        )
    return torch.cuda.device_count() if resolve_device(config) == "cuda" else None


def print_floors(console: Console, request: VideoRequest, floors: Sequence[ConfigFloor]) -> None:
    """One line for each metric of each kernel."""
    spec = request.spec
    title = (
        f"noise floor of {request.prompt!r}, {spec.num_frames}x{spec.height}x{spec.width}, "
        f"{request.num_inference_steps} steps, seed {request.seed}"
    )
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    table = Table(header_style="bold")
    for column in ("kernel", "ranks", "error", "mean", "worst"):
        table.add_column(column, justify="right" if column in ("mean", "worst") else "left")
    for found in floors:
        again = f"{found.layouts[0]}, {found.rerun.num_runs} times"
        for ranks, floor in ((again, found.rerun), (", ".join(dict.fromkeys(found.layouts)), found.floor)):
            if floor.bit_exact:
                table.add_row(found.kernel, ranks, "none: bit-exact", "0", "0")
                continue
            for name, line in floor.lines.items():
                table.add_row(found.kernel, ranks, name, number(line.mean), number(line.worst))
    console.print(table)
