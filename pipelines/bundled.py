"""The configurations that come with videopipe: in the checkout's `configs/`, in the wheel under `pipelines/configs`."""

import difflib
from pathlib import Path

from videopipe.config import ConfigError

_HERE = Path(__file__).resolve().parent


def bundled_configs() -> dict[str, Path]:
    """Every bundled configuration by name, without `.toml`."""
    in_wheel = _HERE / "configs"  # a checkout has none; a wheel must not look at what lies beside it
    folder = in_wheel if in_wheel.is_dir() else _HERE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_config(name: str) -> Path:
    """A configuration by path, or by the name of a bundled one with or without `.toml`.

    Raises:
        ConfigError: neither; names the nearest bundled one.
    """
    if Path(name).is_file():
        return Path(name)
    bundled = bundled_configs()
    found = bundled.get(name.removesuffix(".toml"))
    if found is not None:
        return found
    near = difflib.get_close_matches(Path(name).stem, bundled, n=1, cutoff=0.0)
    hint = f", nearest is {near[0]!r}" if near else ""
    raise ConfigError(f"config={name!r} is neither a file nor a bundled configuration{hint}")
