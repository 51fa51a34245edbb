"""The command line: what it accepts, what it refuses before anything starts, what it writes, how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipelines import cli
from pipelines.checkpoint import Checkpoint, CheckpointError
from pipelines.cli_errors import CommandError
from pipelines.cli_render import gather_requests, render_all, resolve_config
from pipelines.display import LineDisplay
from pipelines.explain import explain_config
from pipelines.hunyuan_video import HunyuanVideo, HunyuanVideoPipeline
from pipelines.launch import LocalLauncher
from pipelines.pipeline import VideoPipeline
from videopipe import media
from videopipe.config import load_config
from videopipe.trace import ENGINE_RANK

ROOT = Path(__file__).parents[1]
SMALL = ("--height=64", "--width=64", "--num_frames=9", "--num-inference-steps=2", "--set=runtime.threads_per_rank=1")
SMALL_KEYS = {
    "request.height": 64,
    "request.width": 64,
    "request.num_frames": 9,
    "request.num_inference_steps": 2,
    "runtime.threads_per_rank": 1,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "two.jsonl"
    path.write_text('{"prompt": "a red fox"}\n{"prompt": "a blue boat", "id": "boat", "seed": 9, "fps": 8}\n')
    return path


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The real command in a process of its own, ended at the end of the block whatever happens."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would ours
    process = subprocess.Popen(
        [sys.executable, "-m", "videopipe", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# -- end to end -------------------------------------------------------------------------------------------------------


def test_a_prompt_file_becomes_clips_and_side_cars(tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    arguments = ["render", "--prompt-path", str(prompts), "--model-path", str(tiny_checkpoint), *SMALL]
    with running(*arguments, "--save_path", str(out), "--trace", str(trace), "--fps=12") as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert sorted(stdout.split()) == [str(out / "00000-a-red-fox-0.mp4"), str(out / "boat.mp4")]
    assert sorted(p.name for p in out.iterdir()) == [
        "00000-a-red-fox-0.json",
        "00000-a-red-fox-0.mp4",
        "boat.json",
        "boat.mp4",
    ]
    for name, seed, fps in (("00000-a-red-fox-0", 0, 12.0), ("boat", 9, 8.0)):
        info = media.probe(out / f"{name}.mp4")
        assert (info.height, info.width, info.num_frames, info.fps) == (64, 64, 9, fps)
        side_car = media.read_side_car(out / f"{name}.json")
        assert (side_car.output, side_car.request.seed, side_car.request.id) == (f"{name}.mp4", seed, name)
        seconds = {(stage.stage, stage.rank) for stage in side_car.stages}
        assert {("denoise", 0), ("decode", 1), ("write", ENGINE_RANK)} <= seconds
    assert "2 of 2 clips are finished" in stderr and "while another request was denoised" in stderr
    assert "Loading weights" not in stderr, "progress bars of libraries must not run through ours"
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"write", "decode", "denoise"} <= {event["cat"] for event in events if event["ph"] == "X"}
    assert all(event["tid"] >= 0 for event in events)
    assert "files" in {event["args"].get("name") for event in events}


@pytest.mark.parametrize("form", ["npy", "latent", "png"])
def test_the_other_formats(
    tiny_checkpoint: Path,
    launcher: LocalLauncher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: str,
) -> None:
    flags = {"model.weights": str(tiny_checkpoint), "output.format": form, **SMALL_KEYS}
    config = resolve_config(None, (), flags)
    (request,) = gather_requests(config, "a red fox", None, None, "fox")
    (path,) = render_all(config, [request], tmp_path, quiet=True, launcher=launcher)
    side_car = media.read_side_car(tmp_path / "fox.json")
    assert (side_car.output, side_car.format) == (path.name, form)
    if form == "npy":
        frames = np.load(path)
        assert frames.dtype == np.uint8 and frames.shape == (9, 64, 64, 3) and frames.std() > 5
        assert side_car.frames_sha256 == media.frames_hash(frames)
    elif form == "latent":
        latents, _ = media.read_latents(path)
        assert tuple(latents.shape) == (1, 16, 3, 8, 8)
        assert side_car.latents_sha256 == media.latents_hash(latents)
    else:
        assert path.is_dir() and len(list(path.glob("*.png"))) == 9
    assert capsys.readouterr() == (f"{path}\n", "")  # quiet: the path alone


def test_explained_weights_are_what_ranks_hold(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    config = load_config(
        {"model": {"weights": str(tiny_checkpoint)}, "groups": {"dit_ranks": 2}, "runtime": {"threads_per_rank": 1}}
    )
    config = load_config(json.loads(explain_config(config).to_json())["config"], ["request.height=64"])
    with HunyuanVideoPipeline.from_pretrained(config=config, launcher=launcher) as pipe:
        held = pipe.engine.weight_bytes
    assert held == {rank.rank: rank.weight_bytes for rank in explain_config(config).ranks}


# -- how it ends ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "many.txt"
    path.write_text("a red fox\n" * 200)
    return path


def arguments_of_a_long_run(checkpoint: Path, prompts: Path, out: Path) -> list[str]:
    steps = ["--num-inference-steps=20", "--set", "runtime.threads_per_rank=1"]
    sizes = ["--height=64", "--width=64", "--num-frames=17"]
    return ["render", "--prompt-file", str(prompts), "--model", str(checkpoint), "-o", str(out), *sizes, *steps]


def check_finished_clips(out: Path, paths: list[str]) -> None:
    """What was reported is whole, and no temporary file lies about."""
    assert paths
    for path in paths:
        assert media.probe(Path(path)).num_frames == 17
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted; "), pytest.param(signal.SIGTERM, 143, "", marks=pytest.mark.slow)],
)
def test_ctrl_c_ends_within_5_s_and_leaves_nothing(
    tiny_checkpoint: Path, many_prompts: Path, tmp_path: Path, number: int, code: int, word: str
) -> None:
    with running(*arguments_of_a_long_run(tiny_checkpoint, many_prompts, tmp_path)) as process:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4  # zygote, two ranks and a writer
        since = time.monotonic()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
        seconds = time.monotonic() - since
    assert process.returncode == code, stderr
    assert seconds < 5
    assert not [child.pid for child in children if child.is_running()]
    if word:
        last = stderr.splitlines()[-1]
        assert re.fullmatch(rf"videopipe: {word}\d+ of 200 clips are finished in {re.escape(str(tmp_path))}", last)
    assert "Traceback" not in stderr
    check_finished_clips(tmp_path, [first, *stdout.split()])


def test_a_lost_rank_is_one_line_and_exit_code_1(tiny_checkpoint: Path, many_prompts: Path, tmp_path: Path) -> None:
    with running(*arguments_of_a_long_run(tiny_checkpoint, many_prompts, tmp_path), "--quiet") as process:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        children = psutil.Process(process.pid).children(recursive=True)
        own = psutil.Process(process.pid).children()
        (zygote,) = [child for child in own if "pipelines.zygote" in child.cmdline()]
        ranks = sorted(zygote.children(), key=lambda child: child.pid)
        ranks[1].kill()
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(
        r"videopipe: rank 1 \(vae\) was killed by SIGKILL during (decode of request '\S+'|idle); "
        r"\d+ of 200 clips are finished in \S+\n",
        stderr,
    )
    assert not [child.pid for child in children if child.is_running()]
    check_finished_clips(tmp_path, [first, *stdout.split()])


@pytest.mark.parametrize("verbose", [False, True])
def test_a_rank_that_cannot_load_is_named(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path, verbose: bool
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    config = resolve_config(None, (), {"model.weights": str(broken), **SMALL_KEYS})
    (request,) = gather_requests(config, "a red fox", None, None, None)
    with pytest.raises(CommandError, match=r"^rank 1 \(vae\) raised OSError: .* during load; 0 of 1 clips") as caught:
        render_all(config, [request], tmp_path / "out", quiet=True, verbose=verbose, launcher=launcher)
    assert caught.value.code == 1
    assert ("Traceback" in caught.value.details) == verbose


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_checkpoint: Path
) -> Iterator[object]:
    """Run a command that must be refused with one line and exit code 2 before any rank is started."""

    def start(*arguments: object, **more: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(VideoPipeline, "start", start)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_checkpoint)

    def run(*argv: str) -> str:
        assert cli.run(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("videopipe: "), err
        return err

    return run  # type: ignore[return-value]


RENDER = ("render", "a fox", "--model=tiny", *SMALL)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("render",), "no prompt is given, need exactly one of PROMPT, --prompt and --prompt-file"),
        (("render", "a", "--prompt=b"), "PROMPT and --prompt are given, need exactly one"),
        (("render", "a", "--prompt-file=p.txt"), "PROMPT and --prompt-file are given"),
        (("render", "  "), "prompt='  ' is empty"),
        (("render", "--prompt-file=none.txt"), "No such file or directory: none.txt"),
        (("render", "--prompt-file=p.txt", "--id=x"), "--id 'x' names a single prompt"),
        (("render", "a", "--heigth=3"), "No such option: --heigth"),
        (("render", "a", "--height=x"), "--height"),
        (("rendr",), "No such command 'rendr'"),
        ((), "Missing command"),
        (("render", "a", "--config=none.toml"), "config='none.toml' is neither a file nor a bundled configuration"),
        (
            ("render", "a", "--set=groups.dit_rank=2"),
            "groups.dit_rank=2 is not a known key, nearest is groups.dit_ranks",
        ),
        (("render", "a", "--dit-ranks=0"), "groups.dit_ranks=0 must be at least 1, nearest is 1"),
        (("render", "a", "--output-format=mp3"), "output.format='mp3' must be one of 'mp4', 'png', 'npy', 'latent'"),
        (("render", "a", "--model=none"), "model.weights='none' is neither a directory nor a hub id"),
        ((*RENDER, "--height=65"), "height=65 must be a multiple of 16, nearest is 64"),
        ((*RENDER, "--num-frames=10"), "num_frames=10 must be 1 + k*4, nearest is 9"),
        ((*RENDER, "--num-inference-steps=0"), "num_inference_steps=0 must be at least 1, nearest is 1"),
        ((*RENDER, "--seed=-1"), "seed=-1 must be between 0 and 2**63 - 1, nearest is 0"),
        ((*RENDER, "--id=a/b"), "id='a/b' must be"),
        ((*RENDER, "--fps=0"), "fps=0 must be between 0 and 1000, nearest is 24"),
        ((*RENDER, "--set=output.codec=libx265x"), "codec='libx265x' must be one of"),
        ((*RENDER, "--set=output.pixel_format=rgb25"), "pixel_format='rgb25' must be one of"),
        (
            (*RENDER, "--set=queue.capacity_bytes=100"),
            "queue.capacity_bytes=100 cannot hold the latents, nearest is 12288",
        ),
        ((*RENDER, "--set=runtime.device=cuda"), "runtime.device='cuda' but torch sees no CUDA device"),
        ((*RENDER, "-o", "file"), "File exists: file"),
        ((*RENDER, "-o", "file/out"), "Not a directory: file/out"),
        ((*RENDER, "--trace=file/t.json"), "File exists: file"),
        ((*RENDER, "--id=t", "--trace=out/t.json"), "id='t' would write t.json, as '--trace' does"),
        (("explain", "none"), "config='none' is neither a file nor a bundled configuration"),
        (("explain", "hunyuan_8gpu", "--height=100"), "request.height=100 must be a multiple of 16, nearest is 96"),
        (("explain",), "Missing argument 'CONFIG'"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(
    refused, tmp_path: Path, argv: tuple[str, ...], message: str
) -> None:
    (tmp_path / "p.txt").write_text("a fox\n")
    (tmp_path / "file").write_text("")
    if "cuda" in str(argv) and _has_cuda():
        pytest.skip("this machine has CUDA")
    assert message in refused(*argv)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_mistakes_in_a_prompt_file_name_the_request(refused, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": "a"}\n{"prompt": "b", "id": "b", "width": 60}\n')
    assert "b: width=60 must be a multiple of 16, nearest is 64" in refused(
        "render", "--prompt-file=p.jsonl", "--model=tiny", *SMALL
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": "a"}\n{"prompt": "b", "id": "a"}\n')
    assert "p.jsonl:2: id='a' is already the id of line 1" in refused("render", "--prompt-file=p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": "a"}\n{"prompt": "b", "id": "a.json"}\n')
    assert "id='a.json' would write a.json, as 'a' does" in refused(
        "render", "--prompt-file=p.jsonl", "--model=tiny", "--output-format=png", *SMALL
    )


def test_a_good_command_would_start(refused) -> None:
    """The twin of the tests above: the same command without a mistake gets as far as the ranks."""
    with pytest.raises(AssertionError, match="ranks were started"):
        cli.run(RENDER)


def test_an_unwritable_folder_is_refused(refused, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused(*RENDER, "-o", "locked")


# -- configuration from the command line ------------------------------------------------------------------------------


def test_file_then_set_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[request]\nheight = 96\nwidth = 96\nnum_frames = 5\n[groups]\ndit_ranks = 3\n")
    config = resolve_config(
        str(file), ["request.width=128", "request.num_frames=9"], {"request.num_frames": 13, "groups.dit_ranks": None}
    )
    r = config.request
    assert (r.height, r.width, r.num_frames) == (96, 128, 13)  # file, --set, flag
    assert config.groups.dit_ranks == 3 and config.groups.vae_ranks == 1  # file, built in


def test_strings_survive_the_way_into_the_configuration() -> None:
    text = 'blurry, "low" quality \\ é\n= [x]'
    assert resolve_config(None, (), {"request.negative_prompt": text}).request.negative_prompt == text
    assert resolve_config(None, (), {"model.weights": "1.5"}).model.weights == "1.5"


def test_underscores_are_dashes_in_names_only() -> None:
    given = ["render", "a_b", "--num_frames=9", "--set", "groups.dit_ranks=2", "--set=a_b=c_d", "--id", "x_y", "--"]
    assert cli.with_dashes([*given, "--a_b"]) == [
        *("render", "a_b", "--num-frames=9", "--set", "groups.dit_ranks=2", "--set=a_b=c_d", "--id", "x_y", "--"),
        "--a_b",
    ]


def test_help_and_version_are_quick(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from pipelines import cli; print(cli.run(['render', '--help']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert "--prompt-file" in done.stdout and "--true-cfg-scale" in done.stdout
    assert cli.run(["--version"]) == 0
    assert re.fullmatch(r"videopipe \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explain_counts_the_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["explain", "hunyuan_8gpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "published" in told["sizes_from"] and told["config"]["groups"]["dit_ranks"] == 7
    ranks, clip = told["ranks"], told["clip"]
    assert clip["latent_shape"] == [1, 16, 33, 90, 160] and clip["video_tokens"] == 118_800
    assert [rank["heads"] for rank in ranks] == [4, 4, 4, 3, 3, 3, 3, 0]
    tokens = [rank["video_tokens"] + rank["text_tokens"] for rank in ranks]
    assert sum(tokens) == 118_800 + 256 and max(tokens[:7]) - min(tokens[:7]) <= 1
    one_head = 128 * 2  # bytes of one token of one head
    for rank, own in zip(ranks[:7], tokens[:7], strict=True):
        sent = 3 * own * (24 - rank["heads"]) * one_head + (sum(tokens) - own) * rank["heads"] * one_head
        assert rank["exchange_bytes_per_layer"] == sent
        assert rank["exchange_bytes_per_step"] == 60 * sent
    assert ranks[7]["exchange_bytes_per_layer"] == 0
    assert ranks[0]["weight_bytes"] == {"denoiser": 2 * 12_821_012_544}
    assert set(ranks[7]["weight_bytes"]) == {"text_encoder", "decoder"}
    assert clip["latent_bytes"] == 4 * 16 * 33 * 90 * 160
    # what is sent is what arrives: q, k and v in one direction, the output in the other, 24 heads of all tokens
    crossing = sum(own * (24 - rank["heads"]) for rank, own in zip(ranks[:7], tokens[:7], strict=True))
    assert sum(rank["exchange_bytes_per_layer"] for rank in ranks) == 4 * crossing * one_head


def test_explain_in_text(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path) -> None:
    arguments = ["explain", "hunyuan_tiny_cpu", f"--model={tiny_checkpoint}", "--dit_ranks=2", "--set=queue.capacity=3"]
    assert cli.run(arguments) == 0
    text = capsys.readouterr().out
    assert f'weights = "{tiny_checkpoint}"' in text and "dit_ranks = 2" in text
    assert "3 clips or" in text and "safetensors headers" in text
    assert re.search(r"^2 +vae +cpu +- +- +- .*text_encoder|^2 +vae +cpu +- +- +- .*decoder", text, re.MULTILINE)
    toml = text.split("\n# decoupled")[0]
    file = tiny_checkpoint.parent / "again.toml"
    file.write_text(toml)
    assert load_config(file) == resolve_config(
        "hunyuan_tiny_cpu",
        ["queue.capacity=3"],
        {"model.weights": str(tiny_checkpoint), "groups.dit_ranks": 2},
    )


def test_true_cfg_doubles_the_exchange() -> None:
    once = explain_config(load_config({"groups": {"dit_ranks": 2}}))
    twice = explain_config(
        load_config({"groups": {"dit_ranks": 2}, "request": {"true_cfg_scale": 2.0, "negative_prompt": "dark"}})
    )
    assert twice.clip.evaluations_per_step == 2
    assert twice.ranks[0].exchange_bytes_per_step == 2 * once.ranks[0].exchange_bytes_per_step
    assert twice.clip.conditioning_bytes == 2 * once.clip.conditioning_bytes


def test_explain_says_when_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    explained = explain_config(load_config({"model": {"weights": "somebody/some-finetune"}}))
    assert "because somebody/some-finetune cannot be reached" in explained.sizes_from
    assert explained.attention_layers == HunyuanVideo.published.facts.attention_layers


def test_a_wrong_checkpoint_is_no_reason_for_published_sizes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny_checkpoint, wrong)
    file = wrong / "transformer" / "config.json"
    file.write_text(file.read_text().replace("HunyuanVideoTransformer3DModel", "WanTransformer3DModel"))
    with pytest.raises(CheckpointError, match="transformer is a WanTransformer3DModel"):
        explain_config(load_config({"model": {"weights": str(wrong)}}))


def test_parameters_are_counted_from_headers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    count = sum(p.numel() for p in model.parameters())
    assert Checkpoint(str(tiny_checkpoint)).num_parameters("transformer") == count
    model.to(torch.float16).save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert Checkpoint(str(tmp_path)).num_parameters("transformer") == count
    assert Checkpoint(str(tmp_path)).num_parameters("vae") is None
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is no safetensors file"):
        Checkpoint(str(tmp_path)).num_parameters("vae")


# -- progress ---------------------------------------------------------------------------------------------------------


def test_lines_tell_stages_and_the_queue(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import io

    stream = io.StringIO()
    with LineDisplay(2, stream) as display:
        display.loaded(0, 2)
        display.loaded(1, 2)
        display.stage("a", "encode")
        display.stage("a", "denoise")
        display.step("a", 0, 2)
        display.step("a", 1, 2)
        display.stage("a", "decode")
        display.stage("a", "done")
        display.written("a", tmp_path / "a.mp4", 1.25)
    lines = [line.split("] ")[1] for line in stream.getvalue().splitlines()]
    assert lines == [
        "starting",
        "rank 0 has loaded its parts (1 of 2)",
        "rank 1 has loaded its parts (2 of 2)",
        "a: encode",
        "a: denoise",
        "a: denoised, 1 in the queue",
        "a: decode",
        "a: finished after 1.2 s (1 of 2)",
    ]
    assert capsys.readouterr().out == f"{tmp_path / 'a.mp4'}\n"


def test_bars_follow_a_clip(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from pipelines.display import BarDisplay

    with BarDisplay(1) as display:
        for rank in range(2):
            display.loaded(rank, 2)
        display.stage("a", "encode")
        display.stage("a", "denoise")
        for step in range(3):
            display.step("a", step, 3)
        display.stage("a", "decode")
        display.stage("a", "done")
        display.written("a", tmp_path / "a.mp4", 1.0)
    assert capsys.readouterr().out == f"{tmp_path / 'a.mp4'}\n"
