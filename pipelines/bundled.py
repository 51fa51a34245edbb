"""The configurations that come with videopipe: in the checkout's `configs/`, in the wheel under `pipelines/configs`."""

import difflib
from pathlib import Path

from videopipe.config import ConfigError

_HERE = Path(__file__).resolve().parent
FOLDERS = (_HERE.parent / "configs", _HERE / "configs")


def bundled_configs() -> dict[str, Path]:
    """Every bundled configuration by name, without `.toml`."""
    return {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("*.toml"))}


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
