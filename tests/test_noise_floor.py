"""The noise floor of a configuration: renders on several rank layouts, and candidates judged against it."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipelines import HunyuanVideoPipeline
from pipelines.compare_cli import app
from pipelines.launch import LocalLauncher
from pipelines.noise_floor import (
    PROMPT,
    RankLayout,
    form_of_clip,
    measure_config_floor,
    request_for,
    usual_layouts,
    with_layout,
)
from videopipe.config import Config, load_config, to_toml
from videopipe.quality import compare_clips, open_clip
from videopipe.quality.compare import Comparison
from videopipe.quality.floor import judge
from videopipe.records import VideoRequest

TWO_LAYOUTS = (RankLayout(1, 0), RankLayout(2, 0))


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> Config:
    return load_config(
        {
            "model": {"weights": str(tiny_checkpoint)},
            "request": {"height": 64, "width": 48, "num_frames": 9, "num_inference_steps": 2, "seed": 3},
            "output": {"format": "latent"},
            "runtime": {"device": "cpu", "threads_per_rank": 1},
        }
    )


def compare(a: Path, b: Path) -> Comparison:
    return compare_clips(open_clip(a), open_clip(b), workers=1)


def test_layouts_are_the_configured_one_one_rank_and_one_more(config: Config) -> None:
    assert [str(layout) for layout in usual_layouts(config, None)] == ["1+1", "1+0", "2+1"]
    assert [str(layout) for layout in usual_layouts(config, 3)] == ["1+1", "1+0", "2+1"]
    assert [str(layout) for layout in usual_layouts(config, 2)] == ["1+1", "1+0"], "no device for one more"
    alone = with_layout(config, RankLayout(1, 0), "latent")
    assert [str(layout) for layout in usual_layouts(alone, None)] == ["1+0", "2+0"]
    for wrong in ("2", "0+1", "a+1", "1+", "-1+0"):
        with pytest.raises(ValueError, match=r"must be DIT\+VAE ranks"):
            RankLayout.parse(wrong)


def test_another_layout_keeps_what_needs_no_vae_group(config: Config) -> None:
    lent = load_config(
        msgspec.to_builtins(config)
        | {
            "model": {"weights": config.model.weights, "attention_kernel": "math"},
            "groups": {"dit_ranks": 3, "vae_ranks": 2, "text_encoder": "vae"},
            "schedule": {"policy": "decoupled", "mode": "deterministic"},
            "attention": {"co_processing": "on", "heads_per_chunk": 1},
            "output": {"record_blocks": 2},
        }
    )
    alone = with_layout(lent, RankLayout(1, 0), "npy")
    assert (alone.groups.text_encoder, alone.attention.co_processing, alone.policy) == ("dit", "off", "colocated")
    assert (alone.attention.heads_per_chunk, alone.schedule.mode) == (1, "deterministic")
    assert (alone.model.attention_kernel, alone.output.format) == ("math", "npy")
    assert not alone.output.records_steps
    more = with_layout(lent, RankLayout(4, 2), "npy")
    assert (more.groups.text_encoder, more.attention.co_processing, more.policy) == ("vae", "on", "decoupled")
    mesh = load_config(
        msgspec.to_builtins(config)
        | {
            "model": {"weights": config.model.weights},
            "groups": {"dit_ranks": 4},
            "attention": {"strategy": "usp", "ulysses_degree": 2},
        }
    )
    degrees = [with_layout(mesh, RankLayout(dit, 1), "npy").attention.ulysses_degree for dit in (4, 5, 6)]
    assert degrees == [2, 0, 2], "2 does not divide 5: the usual degree"


def test_reruns_are_bit_exact_and_layouts_are_not(config: Config, launcher: LocalLauncher, tmp_path: Path) -> None:
    """On CPU the same ranks give the same bits; two ranks sum in another order, and drop padded text."""
    lines: list[str] = []
    request = request_for(config, (), None)
    found, runs = measure_config_floor(
        config,
        request,
        tmp_path,
        compare,
        form="latent",
        layouts=usual_layouts(config, None),
        launcher=launcher,
        note=lines.append,
    )
    assert request.prompt == PROMPT
    assert found.layouts == ("1+1", "1+1", "1+0", "2+1")
    assert lines[2] == "sdpa, 1+0 ranks: run 3 of 4"
    assert found.rerun.bit_exact and found.rerun.num_runs == 2
    assert not found.floor.bit_exact and found.floor.num_runs == 4
    assert 0 < found.floor.lines["rel_l2"].worst < 1e-4
    one_rank, two_ranks = (load_file(run)["latents"] for run in (runs[2], runs[3]))
    assert torch.equal(one_rank, load_file(runs[0])["latents"]) and not torch.equal(one_rank, two_ranks)

    def judged(name: str, latents: torch.Tensor) -> str:
        save_file({"latents": latents}, tmp_path / name)
        return judge([compare(runs[0], tmp_path / name)], found.floor).verdict

    assert judged("same.safetensors", one_rank.clone()) == "same"
    assert judged("within.safetensors", two_ranks.clone()) == "within-floor"
    assert judged("beyond.safetensors", one_rank * 1.001) == "beyond-floor"


def test_mistakes_are_found_before_a_rank_starts(config: Config, tmp_path: Path) -> None:
    request = request_for(config, (), "a fox")
    for layouts, changes, message in (
        (TWO_LAYOUTS, {"num_runs": 1}, "num_runs=1 must be at least 2"),
        ((RankLayout(1, 0),), {"request": msgspec.structs.replace(request, num_inference_steps=0)}, "nearest is 1"),
    ):
        options: dict[str, Any] = {"request": request, "form": "latent", "layouts": layouts, **changes}
        with pytest.raises(ValueError, match=message):
            measure_config_floor(config, folder=tmp_path, compare=compare, **options)
    assert list(tmp_path.iterdir()) == []


def test_runs_are_written_as_the_candidate_is(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8, 3), np.uint8))
    save_file({"latents": torch.zeros(1, 16, 2, 4, 4)}, tmp_path / "b.safetensors")
    assert form_of_clip(open_clip(tmp_path / "a.npy").info) == "npy"
    assert form_of_clip(open_clip(tmp_path / "b.safetensors").info) == "latent"


# -- the command line


@pytest.fixture(scope="module")
def clips(config: Config, launcher: LocalLauncher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Renders of one request: `ref` on one rank, `cand` on two, `wrong` with a mistake, `seed` of another request."""
    folder = tmp_path_factory.mktemp("clips")
    request = request_for(config, (), "a small boat")
    for name, layout in (("ref", RankLayout(1, 0)), ("cand", RankLayout(2, 0))):
        with HunyuanVideoPipeline.start(with_layout(config, layout, "latent"), launcher=launcher) as pipe:
            requests = [msgspec.structs.replace(request, id=name)]
            if name == "cand":
                requests.append(msgspec.structs.replace(request, id="seed", seed=8))
            for result in pipe.render(requests):
                result.save_to(folder)
    latents = load_file(folder / "cand.safetensors")["latents"]
    save_file({"latents": latents + 1e-3 * latents.roll(1, 3)}, folder / "wrong.safetensors")
    (folder / "wrong.json").write_bytes((folder / "cand.json").read_bytes())
    return folder


def test_the_command_judges_a_candidate(config: Config, clips: Path, tmp_path: Path) -> None:
    toml, out = tmp_path / "run.toml", tmp_path / "o.json"
    toml.write_text(to_toml(config))
    options = ["--noise-floor", str(toml), "--layouts", "2+0", "--set", "groups.vae_ranks=0", "--json", str(out)]
    options += ["--expect", "within-floor"]
    good = CliRunner().invoke(app, [str(clips / "ref.safetensors"), str(clips / "cand.safetensors"), *options])
    assert good.exit_code == 0, good.output
    data = json.loads(out.read_text())
    assert (data["verdict"], data["failed"]) == ("within-floor", [])
    floor = data["noise_floors"]["sdpa"]
    assert floor["layouts"] == ["1+0", "1+0", "2+0"]
    assert floor["rerun"]["bit_exact"] and not floor["floor"]["bit_exact"]
    assert floor["floor"]["lines"] == data["noise_floor"]["lines"]
    assert "none: bit-exact" in good.output and "verdict: within-floor" in good.output
    assert "noise floor of 'a small boat'" in good.output, "the request of the side-car"
    wrong = CliRunner().invoke(app, [str(clips / "wrong.safetensors"), *options])  # judged against the renders
    assert wrong.exit_code == 1, wrong.output
    data = json.loads(out.read_text())
    assert data["verdict"] == "beyond-floor" and "is beyond the noise floor" in data["failed"][0]


def test_wrong_use_is_refused_before_anything_is_rendered(config: Config, clips: Path, tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(config))
    ref, cand, other = (str(clips / f"{name}.safetensors") for name in ("ref", "cand", "seed"))
    np.save(tmp_path / "frames.npy", np.zeros((2, 8, 8, 3), np.uint8))
    floor = ["--noise-floor", str(toml)]
    for arguments, message in (
        ([], "need REF and CAND, or --noise-floor CONFIG"),
        ([ref], "need REF and CAND, or --noise-floor CONFIG"),
        ([ref, cand, "--runs", "3"], "--runs goes with --noise-floor CONFIG"),
        ([ref, cand, "--expect", "within-floor"], "needs the noise floor"),
        ([*floor, "--expect", "within-floor"], "judge CAND, and none is given"),
        ([ref, cand, *floor, "--rerun", cand], "need one of them"),
        ([ref, cand, *floor, "--kernels", "sdpaa"], "nearest is 'sdpa'"),
        ([ref, cand, *floor, "--layouts", "2"], "must be DIT+VAE ranks"),
        ([ref, cand, *floor, "--kernels", "sdpa,sdpa-cudnn"], "model.attention_kernel='sdpa-cudnn'"),
        ([ref, cand, *floor, "--runs", "1"], "num_runs=1 must be at least 2"),
        ([ref, other, *floor], "are not of the same request: seed=3 and 8"),
        ([ref, cand, *floor, "--prompt", "a fox"], "leave --prompt out"),
        ([str(tmp_path / "frames.npy"), *floor], "no side-car tells its request"),
        ([ref, str(tmp_path / "frames.npy"), *floor], "different formats, latent and npy"),
        ([str(clips), *floor], "is a directory of clips"),
        (["--noise-floor", "hunyuan_tiny_cup"], "nearest is 'hunyuan_tiny_cpu'"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.output.split()), (arguments, result.output)


def test_the_request_is_that_of_the_side_car(config: Config, clips: Path) -> None:
    found = request_for(config, [clips / "cand.safetensors"], None)
    assert isinstance(found, VideoRequest)
    assert (found.id, found.prompt, found.seed) == ("cand", "a small boat", 3)
