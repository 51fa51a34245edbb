"""What comes with videopipe: configurations and small trained models, found by name in a checkout and in a wheel."""

import difflib
from pathlib import Path

from videopipe.config import ConfigError

_HERE = Path(__file__).resolve().parent

PREFIX = "bundled:"
"""In `model.weights`: what follows is the name of a bundled model."""

MODELS = {"moving_shapes": "demo_model", "moving_shapes_open_sora_plan": "demo_open_sora_plan"}
"""Folder of each bundled model, beside this file."""


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
    raise ConfigError(
        f"config={name!r} is neither a file nor a bundled configuration{_nearest(Path(name).stem, bundled)}"
    )


def bundled_models(root: Path = _HERE) -> dict[str, Path]:
    """Every bundled model that is there, by name; `root` is the folder that holds them."""
    return {name: root / folder for name, folder in MODELS.items() if (root / folder / "model_index.json").is_file()}


def find_weights(weights: str, root: Path = _HERE) -> str:
    """What `model.weights` names: the directory of `bundled:<name>`, anything else as it is.

    Raises:
        ConfigError: no bundled model of that name, or not in this installation; names the nearest that is.
    """
    if not weights.startswith(PREFIX):
        return weights
    name, models = weights.removeprefix(PREFIX), bundled_models(root)
    if name in models:
        return str(models[name])
    if name in MODELS:
        what = f"is not in this installation: {root / MODELS[name]} holds no model_index.json"
    else:
        what = f"is no bundled model, known are {', '.join(PREFIX + known for known in MODELS)}"
    raise ConfigError(f"model.weights={weights!r} {what}{_nearest(weights, {PREFIX + there for there in models})}")


def _nearest(name: str, valid: dict[str, Path] | set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.0)
    return f", nearest is {near[0]!r}" if near else ""
