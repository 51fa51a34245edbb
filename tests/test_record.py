"""Recorded steps: whole tensors on any number of ranks, equal to diffusers', and a mistake is traced to its block."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from diffusers import HunyuanVideoPipeline as DiffusersPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from dit_group.attention import SequenceParallel
from dit_group.call import AttentionCall
from dit_group.denoise import draw_noise
from dit_group.record import StepRecording, evenly_chosen, observing
from pipelines import HunyuanVideoPipeline, cli
from pipelines.checkpoint import Checkpoint
from pipelines.cli_render import check_file_names, gather_requests, render_all, resolve_config
from pipelines.compare_cli import app
from pipelines.hunyuan_video_parts import HunyuanVideoDenoiser
from pipelines.launch import LocalLauncher
from tests.ranks import leave, run_ranks
from videopipe.config import ConfigError, load_config
from videopipe.geometry import VideoSpec
from videopipe.quality.recorder import StepRecorder
from videopipe.quality.trace import recorded_steps, trace
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime

BLOCKS = 4  # of the tiny checkpoint: two dual-stream, two single-stream
STEPS = 2
TOLERANCE = 1e-5
SIZE = {"height": 64, "width": 48, "num_frames": 9}
FOX = VideoRequest(id="fox", prompt="a red fox", spec=VideoSpec(**SIZE), num_inference_steps=STEPS, seed=5)
BOAT = VideoRequest(  # two evaluations for each step
    id="boat",
    prompt="a small blue boat",
    negative_prompt="gray",
    true_cfg_scale=3.0,
    spec=VideoSpec(**SIZE),
    num_inference_steps=STEPS,
    seed=6,
)


@pytest.fixture(scope="module")
def by_diffusers(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the steps of both requests as diffusers' own pipeline computes them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("diffusers")
    pipe = DiffusersPipeline.from_pretrained(str(tiny_checkpoint))
    pipe.set_progress_bar_config(disable=True)
    for request in (FOX, BOAT):
        with StepRecorder(folder / f"{request.id}.steps", pipe.transformer, block_steps=range(STEPS)) as recorder:
            pipe(
                request.prompt,
                negative_prompt=request.negative_prompt,
                true_cfg_scale=request.true_cfg_scale,
                **SIZE,
                num_inference_steps=STEPS,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="latent",
                callback_on_step_end=recorder.on_step_end,
                callback_on_step_end_tensor_inputs=["latents"],
            )
    return folder


def start(
    checkpoint: Path, launcher: LocalLauncher, dit: int, vae: int, lend: str = "off", **output: object
) -> HunyuanVideoPipeline:
    config = {
        "runtime": {"threads_per_rank": 1},
        "output": {"format": "latent", **output},
        "attention": {"co_processing": lend},
    }
    return HunyuanVideoPipeline.from_pretrained(
        checkpoint, config=config, dit_ranks=dit, vae_ranks=vae, launcher=launcher
    )


@pytest.fixture(scope="module")
def by_us(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, Path]]:
    """Output directories of 1+1 and 2+1, by number of DiT ranks: clips, side-cars, recorded steps."""
    folders = {}
    for dit in (1, 2):
        folders[dit] = tmp_path_factory.mktemp(f"{dit}+1")
        with start(tiny_checkpoint, launcher, dit, 1, record_blocks=BLOCKS) as pipe:
            for result in pipe.render([FOX, BOAT], record_to=folders[dit]):
                result.save_to(folders[dit])
    return folders


def test_one_rank_records_what_diffusers_computes_bit_for_bit(by_us: dict[int, Path], by_diffusers: Path) -> None:
    for request, passes in ((FOX, 1), (BOAT, 2)):
        found = trace(by_diffusers / f"{request.id}.steps", by_us[1] / f"{request.id}.steps")
        assert found.first_bitwise is None, str(found.first_bitwise)
        assert found.compared == STEPS * (passes * (BLOCKS * 2 + 1) + 1)  # two streams for each block; prediction


def test_two_ranks_record_whole_tensors_within_rounding(by_us: dict[int, Path], by_diffusers: Path) -> None:
    for request in (FOX, BOAT):
        name = f"{request.id}.steps"
        for reference in (by_diffusers, by_us[1]):
            found = trace(reference / name, by_us[2] / name, tolerance=TOLERANCE, trim=True)
            assert found.first is None, str(found.first)
            assert found.first_bitwise is not None, "the twin: other sums on two ranks, so it was not the same file"
    padded = trace(by_us[1] / "fox.steps", by_us[2] / "fox.steps", tolerance=TOLERANCE).first
    assert padded is not None
    assert (padded.name, padded.reason) == ("pass.0/transformer_blocks.0/1", "shape")  # text: padded and trimmed


def test_steps_that_a_vae_rank_helps_with_are_recorded_whole(
    by_us: dict[int, Path], tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    with start(tiny_checkpoint, launcher, 2, 1, lend="on", record_blocks=BLOCKS) as pipe:
        list(pipe.render([FOX], record_to=tmp_path))
        assert any(span.stage == "assist" for span in pipe.trace.spans)
    found = trace(by_us[2] / "fox.steps", tmp_path / "fox.steps", tolerance=TOLERANCE)
    assert found.first is None, str(found.first)


def test_the_command_line_says_where_two_directories_part(
    by_us: dict[int, Path], tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    arguments = ["--align", "length", "--trace-tolerance", str(TOLERANCE), "--json", str(tmp_path / "o.json")]
    same = CliRunner().invoke(app, [str(by_us[1]), str(by_us[2]), *arguments])
    assert same.exit_code == 0, same.output
    assert f"nothing beyond rel_l2 1e-05 in {STEPS} steps" in " ".join(same.output.split())
    with start(tiny_checkpoint, launcher, 2, 0, record_blocks=BLOCKS) as pipe:
        for request in (FOX, BOAT):
            other = msgspec.structs.replace(request, seed=9)
            for result in pipe.render([other], record_to=tmp_path / "other"):
                result.save_to(tmp_path / "other")
    assert CliRunner().invoke(app, [str(by_us[1]), str(tmp_path / "other"), *arguments]).exit_code == 0
    for clip in json.loads((tmp_path / "o.json").read_text())["clips"].values():
        assert clip["trace"]["first_different_step"] == 0
        assert clip["trace"]["first_different_block"] == "transformer_blocks.0"


def test_recording_changes_nothing_and_is_off_unless_asked(
    by_us: dict[int, Path], tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    with start(tiny_checkpoint, launcher, 2, 1) as pipe:
        plain = {result.request_id: result.latents for result in pipe.render([FOX])}
        (recorded,) = pipe.render([FOX], record_to=tmp_path)
        assert torch.equal(plain["fox"], recorded.latents)
    last = load_file(tmp_path / "fox.steps" / f"step_{STEPS - 1:04d}.safetensors")
    assert list(last) == ["latents", "pass.0/prediction"], "no block was asked for"
    assert torch.equal(last["latents"], recorded.latents)
    assert torch.equal(last["latents"], load_file(by_us[2] / "fox.safetensors")["latents"])
    assert sorted(path.name for path in tmp_path.rglob("*.part")) == []


def test_a_recording_without_a_directory_is_refused(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    with start(tiny_checkpoint, launcher, 1, 0, record_latents=True) as pipe:
        with pytest.raises(ValueError, match=r"output.record_latents=True .* nearest is render\(..., record_to="):
            pipe.render([FOX])
        with pytest.raises(ValueError, match="record_to"):
            pipe("a red fox", **SIZE)


def test_render_replaces_an_earlier_recording(tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path) -> None:
    for steps in (3, 2):
        flags = {"model.weights": str(tiny_checkpoint), "output.record_blocks": 1, "output.format": "npy"}
        sizes = {f"request.{name}": value for name, value in {**SIZE, "num_inference_steps": steps}.items()}
        config = resolve_config(None, ("runtime.threads_per_rank=1",), {**flags, **sizes})
        render_all(config, gather_requests(config, "a fox", None, None, "fox"), tmp_path, quiet=True, launcher=launcher)
        assert list(recorded_steps(tmp_path / "fox.steps")) == list(range(steps))
    names = set(load_file(tmp_path / "fox.steps" / "step_0001.safetensors"))
    assert names == {"pass.0/transformer_blocks.0/0", "pass.0/transformer_blocks.0/1", "pass.0/prediction", "latents"}


def test_mistaken_options_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path
) -> None:
    assert cli.run(["render", "a fox", f"--model={tiny_checkpoint}", "--record-blocks=-1"]) == 2
    assert "output.record_blocks=-1 must be at least 0, nearest is 0" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"output.record_latents='yes' must be true or false"):
        load_config({"output": {"record_latents": "yes"}})
    twins = [FOX, msgspec.structs.replace(FOX, id="fox.steps")]
    check_file_names("png", twins, Path("out"), None)
    with pytest.raises(ValueError, match=r"would write fox.steps"):
        check_file_names("png", twins, Path("out"), None, steps=True)


def test_chosen_blocks_are_spread_evenly() -> None:
    names = [f"b{index}" for index in range(60)]
    assert evenly_chosen(names, 7) == [f"b{index}" for index in range(0, 60, 9)]
    assert (evenly_chosen(names, 0), evenly_chosen(names, 1), evenly_chosen(names, 99)) == ([], ["b0"], names)
    for count in range(1, 70):
        assert 0 < len(evenly_chosen(names, count)) <= count
    with pytest.raises(ValueError, match="record_blocks=-2 must be at least 0"):
        evenly_chosen(names, -2)


# -- mistakes, planted on two ranks


def swapped_heads_from(block: int, parallel: SequenceParallel, first_step: int = 0) -> None:
    """The wrong head order of `tests/test_sharded_dit.py`, from that block of that step on."""
    begin, calls = parallel.begin, 0

    def swapped() -> AttentionCall:
        nonlocal calls
        call, (step, index) = begin(), divmod(calls, BLOCKS)
        calls += 1
        if step >= first_step and index >= block:
            key = call.key
            call.key = lambda k: key(k[:, :, [1, 0, *range(2, k.shape[2])]])  # type: ignore[method-assign]
        return call

    parallel.begin = swapped  # type: ignore[method-assign]


class Sharded:
    """A denoiser whose recorder forgets to gather."""

    def __init__(self, denoiser: HunyuanVideoDenoiser) -> None:
        self._denoiser = denoiser

    def observe(self, keep, num_blocks):  # type: ignore[no-untyped-def]
        return observing(self._denoiser.transformer, None, self._denoiser._geometry, keep, num_blocks)


PLANTED = {
    "right": None,
    "ring": None,
    "block 0": (0, 0),
    "block 3": (3, 0),
    "block 2 of step 1": (2, 1),
    "ungathered": None,
}


def record_mistakes(runtime: Runtime, checkpoint: str, folder: str) -> None:
    keys = {"model": {"weights": checkpoint}, "groups": {"dit_ranks": 2}}
    config = load_config(keys)
    ring = load_config({**keys, "attention": {"strategy": "ring"}})
    generator = torch.Generator().manual_seed(5)
    conditioning = {
        "prompt_embeds": torch.randn(1, 16, 64, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
        "prompt_attention_mask": (torch.arange(16)[None] < 7).long(),
    }
    for name, planted in PLANTED.items():
        denoiser = HunyuanVideoDenoiser(Checkpoint(checkpoint), ring if name == "ring" else config, runtime)
        assert denoiser._parallel is not None
        if planted is not None:
            swapped_heads_from(planted[0], denoiser._parallel, planted[1])
        run = denoiser.begin(FOX, conditioning, draw_noise(denoiser.latent_shape(FOX), FOX.seed))
        recording = StepRecording(Path(folder, f"{name}.steps"), BLOCKS, writes=runtime.is_leader)
        for step in range(run.num_steps):
            recording.step(Sharded(denoiser) if name == "ungathered" else denoiser, run, step)
    leave(runtime)


def test_a_wrong_head_order_is_traced_to_its_first_block(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(record_mistakes, 2, str(tiny_checkpoint), str(tmp_path))
    for name, step, block in (
        ("block 0", 0, "transformer_blocks.0"),
        ("block 3", 0, "single_transformer_blocks.1"),
        ("block 2 of step 1", 1, "single_transformer_blocks.0"),
    ):
        found = trace(tmp_path / "right.steps", tmp_path / f"{name}.steps", tolerance=TOLERANCE).first
        assert found is not None, name
        assert (found.step, found.block, found.reason) == (step, block, "value"), name
        assert found.rel_l2 > 10 * TOLERANCE, name
    ring = trace(tmp_path / "right.steps", tmp_path / "ring.steps", tolerance=TOLERANCE)
    assert ring.first is None and ring.first_bitwise is not None, "another strategy, the same model"
    ungathered = trace(tmp_path / "right.steps", tmp_path / "ungathered.steps").first
    assert ungathered is not None
    assert (ungathered.name, ungathered.reason) == ("pass.0/transformer_blocks.0/0", "shape")
