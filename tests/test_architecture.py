"""The architecture is a test: who imports whom, what an import costs, and what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from pipelines.bundled import bundled_models

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("videopipe", "dit_group", "vae_group", "pipelines")
MAY_IMPORT = {
    "videopipe": {"videopipe"},
    "dit_group": {"dit_group", "videopipe"},
    "vae_group": {"vae_group", "videopipe"},
    "pipelines": {"pipelines", "dit_group", "vae_group", "videopipe", "diffusers", "transformers"},
}
LOOKS_UPWARDS = {"videopipe/__main__.py": {"pipelines.cli.main"}}  # `python -m videopipe` is the command line
GUARDED = {*PACKAGES, "diffusers", "transformers", "tools", "tests"}


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def imports_of(source: str) -> set[str]:
    """Dotted names that a module imports anywhere in it, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden_imports(package: str, source: str) -> set[str]:
    return {name for name in imports_of(source) if name.split(".")[0] in GUARDED - MAY_IMPORT[package]}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    found = {str(p.relative_to(ROOT)): forbidden_imports(package, p.read_text()) for p in modules(package)}
    allowed = {path: names for path, names in LOOKS_UPWARDS.items() if path.startswith(package)}
    assert {path: names for path, names in found.items() if names} == allowed


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("videopipe", "from dit_group.attention import Ulysses"),
        ("dit_group", "import vae_group.decode"),
        ("vae_group", "def f():\n    from diffusers import AutoencoderKL"),
        ("dit_group", "import transformers"),
        ("pipelines", "from tools import demo"),
        ("pipelines", "import tests.ranks"),
    ],
)
def test_an_import_the_wrong_way_is_noticed(package: str, line: str) -> None:
    assert forbidden_imports(package, line)


def knows_parallelism(source: str) -> set[str]:
    return {
        name
        for name in imports_of(source)
        if name.startswith("torch.distributed") or name.split(".")[0] in {"dit_group", "vae_group", "videopipe", "zmq"}
    }


def test_models_know_nothing_of_parallelism() -> None:
    assert {name for path in modules("pipelines/models") for name in knows_parallelism(path.read_text())} == set()


@pytest.mark.parametrize(
    "line",
    ["import torch.distributed as dist", "from torch import distributed", "from torch.distributed import all_reduce"],
)
def test_a_model_that_knows_of_parallelism_is_noticed(line: str) -> None:
    assert knows_parallelism(line)


def contracts_hold(config: Path) -> bool:
    """In a process of its own: import-linter silences every logger that exists."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = ["--config", str(config), "--no-cache"]
    todo = [sys.executable, "-c", command, *arguments]
    done = subprocess.run(todo, check=False, cwd=ROOT, capture_output=True, text=True)
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return done.returncode == 0


def test_the_contracts_of_pyproject_hold() -> None:
    assert contracts_hold(ROOT / "pyproject.toml"), "run `lint-imports` for the report"


def test_a_broken_contract_fails(tmp_path: Path) -> None:
    """The twin: the groups reversed."""
    config = tmp_path / "contracts.toml"
    text = (ROOT / "pyproject.toml").read_text()
    right = 'layers = ["pipelines", "dit_group | vae_group", "videopipe"]'
    assert right in text
    config.write_text(text.replace(right, 'layers = ["videopipe", "dit_group | vae_group", "pipelines"]'))
    assert not contracts_hold(config)


def cycles() -> set[tuple[str, str]]:
    """Pairs of packages that import each other."""
    edges: defaultdict[str, set[str]] = defaultdict(set)
    for package in PACKAGES:
        for path in modules(package):
            names = imports_of(path.read_text()) - LOOKS_UPWARDS.get(str(path.relative_to(ROOT)), set())
            edges[package] |= {name.split(".")[0] for name in names} & set(PACKAGES) - {package}
    return {(a, b) for a in PACKAGES for b in edges[a] if a in edges[b]}


def test_no_two_packages_import_each_other() -> None:
    assert cycles() == set()


# -- what an import costs

HEAVY = ("torch", "av", "diffusers", "transformers", "numpy", "zmq")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(answer.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import videopipe",
        "import videopipe.config, videopipe.partition, videopipe.queue, videopipe.scheduler, videopipe.records",
        "import pipelines",
    ],
)
def test_an_import_that_needs_no_tensors_loads_none(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_an_import_of_torch_would_be_noticed() -> None:
    assert "torch" in loaded_by("import videopipe.exchange")


# -- the wheel


def build_wheel(directory: Path) -> Path:
    code = f"from hatchling.build import build_wheel; build_wheel({str(directory)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_four_packages_the_configs_and_the_models(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(build_wheel(tmp_path)) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    for package in PACKAGES:
        for path in modules(package):
            assert str(path.relative_to(ROOT)) in names
    for path in (ROOT / "configs").rglob("*.toml"):
        assert f"pipelines/configs/{path.relative_to(ROOT / 'configs')}" in names
    for folder in bundled_models().values():
        for path in folder.rglob("*"):
            assert path.is_dir() or str(path.relative_to(ROOT)) in names
    assert "videopipe/py.typed" in names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert entry_points
    # what is found by name is found in the wheel, and not beside it
    code = (
        "from pipelines.bundled import bundled_configs, bundled_models;"
        "print(*bundled_configs().values(), *bundled_models().values(), sep='\\n')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = [Path(line) for line in answer.stdout.split()]
    assert {path.name for path in found} == {
        *(path.name for path in (ROOT / "configs").glob("*.toml")),
        *(path.name for path in bundled_models().values()),
    }
    assert all(path.is_relative_to(installed) and path.exists() for path in found)
