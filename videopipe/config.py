"""The configuration of a run: TOML into frozen structs; every mistake is one line that names the path.

Precedence: built-in defaults, then the file, then `--set path=value` and the flags of the command line.
"""

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from videopipe.arrangement import Guidance
from videopipe.geometry import VideoSpec
from videopipe.records import OutputFormat
from videopipe.scheduler import helper_sets

DType = Literal["float32", "bfloat16", "float16"]
AttentionKernel = Literal[
    "sdpa",
    "sdpa-flash",
    "sdpa-efficient",
    "sdpa-math",
    "sdpa-cudnn",
    "flash-attention-2",
    "flash-attention-3",
    "sage",
    "math",
]


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: path, value, what would be right."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which weights run in which precision. `vae_dtype` and `text_encoder_dtype` default to `dtype`.

    `attention_kernel`: `sdpa` lets torch choose its backend, the others name one; `math` is a float64 reference.
    """

    family: Literal["hunyuan-video", "open-sora-plan"] = "hunyuan-video"
    weights: str = "hunyuanvideo-community/HunyuanVideo"
    revision: str | None = None
    dtype: DType = "float32"
    vae_dtype: DType | None = None
    text_encoder_dtype: DType | None = None
    attention_kernel: AttentionKernel = "sdpa"


class GroupsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many ranks denoise and how many decode; `vae_ranks = 0` puts both on the DiT ranks."""

    dit_ranks: int = 1
    vae_ranks: int = 1
    text_encoder: Literal["dit", "vae"] = "dit"


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who works when. `auto` is `decoupled` where there are VAE ranks and `colocated` where there are none."""

    policy: Literal["auto", "colocated", "decoupled"] = "auto"
    mode: Literal["fast", "deterministic"] = "fast"


class AttentionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How q, k and v travel in the DiT group.

    `strategy`: `ulysses` exchanges tokens for heads; `ring` passes keys and values round, so ranks may outnumber heads;
    `usp` does both on a mesh, `ulysses_degree` ranks dividing heads (0: as many as divide the ranks and have a head
    each), `mesh_inside` naming the axis of neighbouring ranks; `xfuser` is Ulysses through xfuser's own exchange, for
    comparison, where tokens and heads divide by the ranks.
    `text` says what happens to padded text tokens: `trimmed` drops them, `padded` keeps and masks them, `auto` keeps
    them on one rank (where the result is then bit-equal to diffusers) and with `xfuser`, whose tokens must be known to
    divide by the ranks before the prompt is, trims them on several, and for Open-Sora-Plan, which diffusers does not
    have, always.
    `heads_per_chunk`: so many heads of each rank travel while others compute (PipeSP); `all` is the plain path.
    `balance`: `heads` gives whole heads to ranks; `rows` divides those left over by query rows, so that 24 heads load
    5 or 7 ranks equally.
    `co_processing`: VAE ranks that have nothing to decode take a share of the DiT group's attention (PipeDiT's Aco).
    `cfg_parallel`: requests with guidance are evaluated by two halves of the DiT group, one branch each, with sequence
    parallelism of their own; once in a step two ranks exchange the predictions of their tokens. Other requests are
    rendered by the whole group.
    `ping_pong`: both branches of guidance run on the whole DiT group, layer by layer in turn, so that one computes
    while the other's attention travels or is computed by helpers. It takes the activations of both; steps that are
    recorded do without.
    `auto` for `heads_per_chunk`, `balance`, `co_processing` and `ping_pong` is measured on the ranks for each size of
    clip before its first denoising, and kept in `calibration_cache`, a folder (by default `videopipe/calibration` in
    the user's cache folder); the plain way (`all`, `heads`, `off`) stays where nothing else is faster, and with
    `schedule.mode = "deterministic"`.
    `overlap_mlp`: with several DiT ranks, the MLP of single-stream blocks runs while q, k, v and the output travel.
    """

    strategy: Literal["ulysses", "ring", "usp", "xfuser"] = "ulysses"
    ulysses_degree: int = 0
    mesh_inside: Literal["ulysses", "ring"] = "ulysses"
    heads_per_chunk: int | Literal["all", "auto"] = "all"
    balance: Literal["heads", "rows", "auto"] = "heads"
    co_processing: Literal["on", "off", "auto"] = "off"
    cfg_parallel: Literal["on", "off"] = "off"
    ping_pong: Literal["on", "off", "auto"] = "off"
    calibration_cache: str | None = None
    overlap_mlp: bool = True
    text: Literal["auto", "trimmed", "padded"] = "auto"

    @property
    def fixed_heads_per_chunk(self) -> int | None:
        """Heads in a chunk, None for all at once and where nothing is given."""
        return self.heads_per_chunk if isinstance(self.heads_per_chunk, int) else None

    @property
    def fixed_balance(self) -> Literal["heads", "rows"]:
        """What happens to leftover heads where nothing was measured."""
        return "heads" if self.balance == "auto" else self.balance


class QueueConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounded queue between the groups: clips and bytes that may wait, and finished clips not yet taken away."""

    capacity: int = 2
    capacity_bytes: int = 4 * 1024**3
    max_undelivered: int = 4


class DecodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How latents become frames.

    `mode`: with `clip` each decoding rank decodes a whole clip, so several clips are decoded side by side; with
    `tiles` all decoding ranks share one clip; with `stream` each rank decodes a clip of its own in chunks of time,
    whose frames leave while the rest is being decoded. It does not change the frames.
    `exact`: the untiled result, whatever the ranks and the chunks; without it that of the model's reference
    implementation, which for HunyuanVideo is tiled in time.
    `tiling` decodes in spatial tiles as diffusers' `enable_tiling` does; the time tiles are the model's own default.
    Without it whole pictures are wanted, and tiles are taken where those do not fit the memory.
    `tile_*`: height and width in px and frames of a tile, and how much of it the next one overlaps; 0 for the preset's
    own, and for a quarter of a tile whose size is given. A height or width switches spatial tiles on. For
    Open-Sora-Plan, whose chunks of time do not change the result, only `tile_frames` has a meaning.
    `tile_preset`: `default` are the model's own tiles, `official` those of HunyuanVideo's own code (64 frames, of which
    16 overlap), `largest` the largest that fit the memory. Whatever is asked for, smaller tiles are taken where it does
    not fit, and the log says so; they give other numbers, which `exact` never does.
    `memory_limit`: bytes that a decode may take on a device, weights aside; 0 for all that is free. With
    `schedule.mode = "deterministic"` it alone decides how much smaller, whatever is free, so that numbers stay.
    """

    mode: Literal["clip", "tiles", "stream"] = "clip"
    exact: bool = False
    tiling: bool = False
    tile_preset: Literal["default", "official", "largest"] = "default"
    tile_height: int = 0
    tile_width: int = 0
    tile_frames: int = 0
    tile_overlap_height: int = 0
    tile_overlap_width: int = 0
    tile_overlap_frames: int = 0
    memory_limit: int = 0


class MemoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept off the devices.

    `precompute_modulation`: the adaLN layers, 3.42 of HunyuanVideo's 12.8 billion parameters, stay in host memory;
    their results for all steps are computed when a request begins. The same output.
    """

    precompute_modulation: bool = False


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is written for each request.

    `record_latents`: also `<id>.steps/`, with the prediction and the latents of every denoising step; `record_blocks`:
    in these also the outputs of so many of the DiT's blocks, evenly chosen from the first one on.
    `writers`: processes that encode and write clips. `rescue_directory`: for the latents of a clip that cannot be
    written, where they cannot be kept beside it either; the system's temporary directory where None.
    """

    format: OutputFormat = "mp4"
    codec: str = "libx264"
    crf: int = 18
    pixel_format: str = "yuv420p"
    fps: float = 24.0
    record_latents: bool = False
    record_blocks: int = 0
    writers: int = 1
    rescue_directory: str | None = None

    @property
    def records_steps(self) -> bool:
        """Whether denoising steps are recorded."""
        return self.record_latents or self.record_blocks > 0


class RequestConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request asks for where neither the prompt file nor a flag says otherwise."""

    height: int = 720
    width: int = 1280
    num_frames: int = 129
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    true_cfg_scale: float = 1.0
    negative_prompt: str | None = None
    max_sequence_length: int = 256
    seed: int = 0


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where ranks run. `threads_per_rank` is for the CPU; 0 shares the cores equally between the ranks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_rank: int = 0


class FaultsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a rank counts as lost, in seconds.

    `heartbeat_timeout_s`: no sign of life from the process (stopped, host gone). `hang_timeout_s`: alive, but in the
    same operation for this long. `start_timeout_s`: a rank that never reports after it was started.
    """

    heartbeat_timeout_s: float = 8.0
    hang_timeout_s: float = 600.0
    start_timeout_s: float = 120.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One complete run."""

    model: ModelConfig = msgspec.field(default_factory=ModelConfig)
    groups: GroupsConfig = msgspec.field(default_factory=GroupsConfig)
    schedule: ScheduleConfig = msgspec.field(default_factory=ScheduleConfig)
    attention: AttentionConfig = msgspec.field(default_factory=AttentionConfig)
    queue: QueueConfig = msgspec.field(default_factory=QueueConfig)
    decode: DecodeConfig = msgspec.field(default_factory=DecodeConfig)
    memory: MemoryConfig = msgspec.field(default_factory=MemoryConfig)
    output: OutputConfig = msgspec.field(default_factory=OutputConfig)
    request: RequestConfig = msgspec.field(default_factory=RequestConfig)
    runtime: RuntimeConfig = msgspec.field(default_factory=RuntimeConfig)
    faults: FaultsConfig = msgspec.field(default_factory=FaultsConfig)

    @property
    def world_size(self) -> int:
        """Number of ranks of both groups."""
        return self.groups.dit_ranks + self.groups.vae_ranks

    @property
    def policy(self) -> Literal["colocated", "decoupled"]:
        """The schedule's policy with `auto` resolved."""
        if self.schedule.policy == "auto":
            return "decoupled" if self.groups.vae_ranks else "colocated"
        return self.schedule.policy

    @property
    def helper_sets(self) -> tuple[tuple[int, ...], ...]:
        """Sets of VAE ranks that may be lent to a denoising step."""
        a = self.attention
        if a.co_processing == "off":
            return ()
        if a.co_processing == "auto" and not (self._may_measure and a.strategy == "ulysses"):
            return ()
        return helper_sets(range(self.groups.dit_ranks, self.world_size))

    @property
    def decode_teams(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that decode a clip together, team by team."""
        first = self.groups.dit_ranks if self.groups.vae_ranks else 0
        ranks = tuple(range(first, self.world_size))
        return (ranks,) if self.decode.mode == "tiles" else tuple((rank,) for rank in ranks)

    @property
    def calibrates(self) -> bool:
        """Whether something about the exchange of heads is to be measured."""
        a = self.attention
        of_heads = self.groups.dit_ranks > 1 and "auto" in (a.heads_per_chunk, a.balance, a.ping_pong)
        helped = bool(self.helper_sets) and "auto" in (a.co_processing, a.ping_pong)
        return self._may_measure and (of_heads or helped)

    @property
    def _may_measure(self) -> bool:
        """Deterministic runs depend on no timing, and a ring leaves nothing to choose."""
        return self.schedule.mode == "fast" and self.attention.strategy in ("ulysses", "usp")

    def guidance(self, evaluations: int) -> Guidance:
        """How a request whose steps have so many evaluations is evaluated."""
        a = self.attention
        if evaluations != 2:
            return "none"
        if a.cfg_parallel == "on":
            return "halves"
        measured = a.ping_pong == "auto" and self._may_measure
        return "pair" if a.ping_pong == "on" or measured else "none"

    def members(self, guidance: Guidance) -> int:
        """DiT ranks that share a sequence which is evaluated so."""
        return self.groups.dit_ranks // 2 if guidance == "halves" else self.groups.dit_ranks

    @property
    def text_trimmed(self) -> bool:
        """Whether padded text tokens are dropped before the DiT."""
        if self.attention.text == "auto":
            several = self.groups.dit_ranks > 1 and self.attention.strategy != "xfuser"
            return several or self.model.family == "open-sora-plan"
        return self.attention.text == "trimmed"

    def spec(self) -> VideoSpec:
        """The size of a clip that a request gets by default."""
        r = self.request
        return VideoSpec(height=r.height, width=r.width, num_frames=r.num_frames, fps=self.output.fps)


def load_config(source: Path | str | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration from a TOML file (or a mapping), with overrides.

    Args:
        source: path of a TOML file, a nested mapping with the same keys, or None for the defaults.
        overrides: `path=value` strings; the value is read as TOML, and as a bare string where that fails.
    Raises:
        ConfigError: unreadable file, unknown key, wrong type or impossible value; one line that names it.
    """
    data: dict[str, Any]
    if source is None:
        data = {}
    elif isinstance(source, Mapping):
        data = {table: dict(keys) if isinstance(keys, Mapping) else keys for table, keys in source.items()}
    else:
        data = _read_toml(Path(source))
    for override in overrides:
        _set_path(data, override)
    _check_type("", data, Config)
    config = msgspec.convert(data, Config)
    check_config(config)
    return config


def to_toml(config: Config) -> str:
    """The complete configuration as TOML that `load_config` reads back to the same; keys without a value are left out.

    `schedule.policy = "auto"` and its like stay as they are.
    """
    lines: list[str] = []
    for table, keys in msgspec.to_builtins(config).items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in keys.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: str | float | bool) -> str:
    if isinstance(value, str):
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")  # TOML's strings are JSON's but for DEL
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_config(config: Config) -> None:
    """Refuse combinations that no machine can run.

    Raises:
        ConfigError: names the path, the value and the nearest valid value.
    """
    g, q = config.groups, config.queue
    _at_least("groups.dit_ranks", g.dit_ranks, 1)
    _at_least("groups.vae_ranks", g.vae_ranks, 0)
    if isinstance(config.attention.heads_per_chunk, int):
        _at_least("attention.heads_per_chunk", config.attention.heads_per_chunk, 1)
    _check_attention(config)
    _check_decode(config.decode)
    _at_least("output.record_blocks", config.output.record_blocks, 0)
    _at_least("output.writers", config.output.writers, 1)
    _at_least("queue.capacity", q.capacity, 1)
    _at_least("queue.capacity_bytes", q.capacity_bytes, 1)
    _at_least("queue.max_undelivered", q.max_undelivered, 1)
    _at_least("runtime.threads_per_rank", config.runtime.threads_per_rank, 0)
    for name, value in (
        ("faults.heartbeat_timeout_s", config.faults.heartbeat_timeout_s),
        ("faults.hang_timeout_s", config.faults.hang_timeout_s),
        ("faults.start_timeout_s", config.faults.start_timeout_s),
    ):
        _at_least(name, value, 1.0)
    if not 0 <= config.output.crf <= 51:
        near = min(max(config.output.crf, 0), 51)
        raise ConfigError(f"output.crf={config.output.crf} must be 0 to 51, nearest is {near}")
    if config.schedule.policy == "decoupled" and g.vae_ranks == 0:
        raise ConfigError("groups.vae_ranks=0 cannot be decoupled: schedule.policy='decoupled' needs 1, nearest is 1")
    if config.schedule.policy == "colocated" and g.vae_ranks > 0:
        raise ConfigError(
            f"groups.vae_ranks={g.vae_ranks} would idle: schedule.policy='colocated' decodes on the DiT ranks, "
            "nearest is 0"
        )
    if config.attention.co_processing == "on" and g.vae_ranks == 0:
        raise ConfigError("attention.co_processing='on' needs a VAE group but groups.vae_ranks=0, nearest is 'off'")
    if g.text_encoder == "vae" and g.vae_ranks == 0:
        raise ConfigError("groups.text_encoder='vae' needs a VAE group but groups.vae_ranks=0, nearest is 'dit'")


def _check_attention(config: Config) -> None:
    a, ranks = config.attention, config.groups.dit_ranks
    _at_least("attention.ulysses_degree", a.ulysses_degree, 0)
    unused: list[tuple[str, str | int, str | int]] = []  # key, value, the only one that has a meaning here
    if a.strategy in ("ring", "xfuser"):
        unused += [("heads_per_chunk", a.heads_per_chunk, "all"), ("balance", a.balance, "heads")]
    if a.strategy != "usp":
        unused += [("ulysses_degree", a.ulysses_degree, 0), ("mesh_inside", a.mesh_inside, "ulysses")]
    if a.strategy != "ulysses":  # a helper owns no tokens, so it could only share whole heads
        unused += [("co_processing", a.co_processing, "off")]
    for name, value, default in unused:
        if value not in (default, "auto"):
            raise ConfigError(
                f"attention.{name}={value!r} means nothing to attention.strategy={a.strategy!r}, nearest is {default!r}"
            )
    if a.ulysses_degree and ranks % a.ulysses_degree:
        near = min((d for d in range(1, ranks + 1) if ranks % d == 0), key=lambda d: abs(d - a.ulysses_degree))
        raise ConfigError(
            f"attention.ulysses_degree={a.ulysses_degree} must divide groups.dit_ranks={ranks}, nearest is {near}"
        )
    if a.cfg_parallel == "on" and ranks % 2:
        raise ConfigError(
            f"groups.dit_ranks={ranks} cannot be halved: attention.cfg_parallel='on' needs an even number, "
            f"nearest is {max(ranks - 1, 2)}"
        )
    half = ranks // 2
    if a.cfg_parallel == "on" and a.ulysses_degree and half % a.ulysses_degree:
        near = min((d for d in range(1, half + 1) if half % d == 0), key=lambda d: abs(d - a.ulysses_degree))
        raise ConfigError(
            f"attention.ulysses_degree={a.ulysses_degree} must divide the {half} ranks of each half of the DiT group "
            f"with attention.cfg_parallel='on', nearest is {near}"
        )
    if a.ping_pong == "on":
        for path, value, wrong, why in (
            ("attention.cfg_parallel", a.cfg_parallel, "on", "gives each half of the DiT group one branch"),
            ("attention.strategy", a.strategy, "xfuser", "waits for each of its exchanges"),
        ):
            if value == wrong:
                raise ConfigError(
                    f"attention.ping_pong={a.ping_pong!r} has nothing to do where {path}={value!r} {why}, "
                    "nearest is 'off'"
                )
        if ranks == 1 and not config.helper_sets:
            raise ConfigError(
                f"attention.ping_pong={a.ping_pong!r} has nothing to do with groups.dit_ranks=1 and no helpers: no "
                "attention travels, nearest is 'off'"
            )
    if a.strategy == "xfuser" and a.text == "trimmed" and ranks > 1:
        raise ConfigError(
            "attention.text='trimmed' leaves as many tokens as the prompt has, which need not divide by the ranks as "
            "attention.strategy='xfuser' needs; nearest is 'padded'"
        )
    if a.strategy == "xfuser" and a.cfg_parallel == "on":
        raise ConfigError("attention.cfg_parallel='on' cannot go with attention.strategy='xfuser', nearest is 'off'")
    if a.strategy in ("ring", "usp") and config.model.attention_kernel in ("sdpa-math", "sdpa-cudnn"):
        raise ConfigError(
            f"model.attention_kernel={config.model.attention_kernel!r} gives no log-sum-exp, which "
            f"attention.strategy={a.strategy!r} needs; nearest is 'sdpa'"
        )


def _check_decode(decode: DecodeConfig) -> None:
    sizes = ("tile_height", "tile_width", "tile_frames", "tile_overlap_height", "tile_overlap_width")
    for name in (*sizes, "tile_overlap_frames", "memory_limit"):
        _at_least(f"decode.{name}", getattr(decode, name), 0)
    if not decode.exact:
        return
    if decode.tiling:
        raise ConfigError("decode.tiling=true blends tiles, which decode.exact=true is without, nearest is false")
    if decode.tile_preset == "official":
        raise ConfigError(
            "decode.tile_preset='official' blends tiles, which decode.exact=true is without, nearest is 'default'"
        )
    for name in ("tile_height", "tile_width", "tile_overlap_height", "tile_overlap_width", "tile_overlap_frames"):
        if getattr(decode, name):
            raise ConfigError(f"decode.{name}={getattr(decode, name)} means nothing to decode.exact=true, nearest is 0")


def _at_least(path: str, value: float, low: float) -> None:
    if value < low:
        raise ConfigError(f"{path}={value} must be at least {low:g}, nearest is {low:g}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f", nearest is {path.parent / near[0]}" if near else ""
        raise ConfigError(f"config={str(path)!r} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={str(path)!r} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config={str(path)!r} is not TOML: {error}") from None


def _set_path(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override!r} must look like table.key=value, for example groups.dit_ranks=2")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = data
    for key in keys[:-1]:
        child = table.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{path.strip()}={value!r}: {key} is a value, not a table")
        table = child
    table[keys[-1]] = value


def _check_type(path: str, value: Any, expected: Any, default: Any = None) -> None:
    """Walk `value` along the annotated type; the first mismatch becomes a ConfigError."""
    origin = typing.get_origin(expected)
    if isinstance(expected, type) and issubclass(expected, msgspec.Struct):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r} must be a table, as in [{path}]")
        hints = typing.get_type_hints(expected)
        defaults = {field.name: field.default for field in msgspec.structs.fields(expected)}
        for key, item in value.items():
            inner = f"{path}.{key}" if path else key
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
                full = f"{path}.{near}" if path else near
                raise ConfigError(f"{inner}={_short(item)} is not a known key, nearest is {full}")
            _check_type(inner, item, hints[key], defaults[key])
    elif origin is Literal:
        allowed = typing.get_args(expected)
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.0)[0]
            choices = ", ".join(repr(a) for a in allowed)
            raise ConfigError(f"{path}={_short(value)} must be one of {choices}; nearest is {near!r}")
    elif origin in (typing.Union, types.UnionType):
        inner_types = [t for t in typing.get_args(expected) if t is not type(None)]
        if value is None and type(None) in typing.get_args(expected):
            return
        if isinstance(value, str) and len(inner_types) > 1:  # such as 2 or "all": a word is looked up among the words
            inner_types = [t for t in inner_types if typing.get_origin(t) is Literal] or inner_types
        _check_type(path, value, inner_types[0], default)
    elif expected is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{path}={_short(value)} must be a number{_nearest_number(value, float, default)}")
        if not math.isfinite(value):
            raise ConfigError(f"{path}={value} must be finite, nearest is {default}")
    elif expected is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{path}={_short(value)} must be a whole number{_nearest_number(value, int, default)}")
    elif expected is bool:
        if not isinstance(value, bool):
            near = "true" if value else "false"
            raise ConfigError(f"{path}={_short(value)} must be true or false, nearest is {near}")
    elif expected is str and not isinstance(value, str):
        raise ConfigError(f"{path}={_short(value)} must be text, nearest is {str(value)!r}")


def _nearest_number(value: Any, kind: type[int] | type[float], default: Any) -> str:
    try:
        near = float(value) if kind is float else round(float(value))
    except (TypeError, ValueError, OverflowError):
        near = default
    return f", nearest is {near}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
