"""The quality bench tells good from bad, exact from lossy, and says how sure it is."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from pipelines.launch import LocalLauncher
from tests.demo_models import tiny_moving_shapes, tiny_open_sora_plan
from tools.bench_quality import (
    MAX_PSNR_DB,
    BenchPrompt,
    Case,
    ClipSize,
    Frames,
    Renderer,
    bench_prompts,
    damage_weights,
    diffusers_renderer,
    main,
    mcnemar,
    measure,
    parse_case,
    psnr_db,
    run_bench,
    ssim,
    table,
    truth_renderer,
    videopipe_renderer,
    wilson,
)
from tools.moving_shapes import is_held_out, render
from videopipe.records import VideoRequest

SIZE = ClipSize(num_frames=17, height=64, width=64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts() -> list[BenchPrompt]:
    return bench_prompts(24, seed=0, split="held_out", num_objects=None)


def _recoloured(prompts: Sequence[BenchPrompt]) -> Iterable[Frames]:
    for p in prompts:
        yield np.ascontiguousarray(render(p.scene, 17, 64, 64)[..., [1, 2, 0]])


def _reversed(prompts: Sequence[BenchPrompt]) -> Iterable[Frames]:
    for p in prompts:
        yield render(p.scene, 17, 64, 64)[::-1].copy()


def test_prompts_are_held_out_and_always_the_same(prompts: list[BenchPrompt]) -> None:
    assert all(is_held_out(t) for p in prompts for t in p.scene.objects)
    assert prompts == bench_prompts(24, seed=0, split="held_out", num_objects=None)
    assert prompts[:5] == bench_prompts(5, seed=0, split="held_out", num_objects=None)
    assert [p.prompt for p in prompts] != [
        p.prompt for p in bench_prompts(24, seed=1, split="held_out", num_objects=None)
    ]
    assert {len(p.scene.objects) for p in bench_prompts(9, seed=0, split="train", num_objects=2)} == {2}


def test_truth_scores_full_marks_and_equals_itself(prompts: list[BenchPrompt]) -> None:
    cases = [Case(name="a", renderer="truth"), Case(name="b", renderer="truth")]
    first, second = run_bench(prompts, cases, lambda case: truth_renderer(SIZE))
    assert all(a["share"] == 1.0 for a in first["accuracy"].values())
    assert first["accuracy"]["shape"]["low"] < 1.0  # a small sample is never certain
    assert "psnr_db" not in first
    assert second["identical"] == len(prompts)
    assert second["psnr_db"]["mean"] == MAX_PSNR_DB
    assert second["ssim"]["mean"] == 1.0
    assert second["p_same_as_reference"] == 1.0


def test_wrong_colours_and_wrong_motions_are_told_apart(prompts: list[BenchPrompt]) -> None:
    renderers: dict[str, Renderer] = {"exact": truth_renderer(SIZE), "colours": _recoloured, "backwards": _reversed}
    cases = [Case(name=name) for name in renderers]
    _, colours, backwards = run_bench(prompts, cases, lambda case: renderers[case.name])
    assert colours["accuracy"]["colour"]["share"] == 0
    assert colours["accuracy"]["motion"]["share"] == 1
    assert backwards["accuracy"]["colour"]["share"] == 1
    assert 0.2 < backwards["accuracy"]["motion"]["share"] < 0.8  # still, and bounce, look the same backwards
    assert sum(colours["misread"]["colour"].values()) == colours["accuracy"]["colour"]["total"]
    turned = {"left -> right", "right -> left", "up -> down", "down -> up", "grow -> None", "rotate -> still"}
    assert backwards["misread"]["motion"].keys() <= turned
    assert not backwards["misread"]["colour"]
    for result in (colours, backwards):
        assert result["p_same_as_reference"] < 0.01
        assert result["psnr_db"]["mean"] < MAX_PSNR_DB
        assert result["ssim"]["mean"] < 0.99
    text = table([_, colours, backwards])
    assert text.count("\n") == 5
    assert "| colours | 0.0 [" in text


def test_a_lost_clip_is_an_error(prompts: list[BenchPrompt]) -> None:
    with pytest.raises(ValueError, match="gave 2 clips for 3 prompts"):
        measure(prompts[:3], lambda ps: list(_reversed(ps))[:2], None)


def test_empty_clips_count_as_wrong_and_abstained(prompts: list[BenchPrompt]) -> None:
    result = measure(prompts, lambda ps: (np.zeros((17, 64, 64, 3), np.uint8) for _ in ps), None)
    assert result["accuracy"]["shape"]["right"] == 0
    assert result["abstained"]["shape"] == result["accuracy"]["shape"]["total"]
    assert all(what.endswith(" -> None") for what in result["misread"]["shape"])


@dataclass(frozen=True)
class _Finished:
    request_id: str
    frames: Frames


def test_videopipes_clips_may_finish_in_any_order(prompts: list[BenchPrompt]) -> None:
    case = Case(name="x", steps=9, true_cfg=2.0)
    scenes = {p.id: p.scene for p in prompts}
    seen: list[VideoRequest] = []

    def render_all(requests: list[VideoRequest]) -> Iterable[_Finished]:
        seen.extend(requests)
        for request in reversed(requests):
            yield _Finished(request.id, render(scenes[request.id], 17, 64, 64))

    result = measure(prompts, videopipe_renderer(render_all, case, SIZE), None)
    assert result["accuracy"]["all"]["share"] == 1.0
    assert [(r.prompt, r.seed) for r in seen] == [(p.prompt, p.seed) for p in prompts]
    assert {(r.num_inference_steps, r.true_cfg_scale, r.negative_prompt, r.spec.num_frames) for r in seen} == {
        (9, 2.0, "", 17)
    }
    with pytest.raises(ValueError, match="no frames came for 1 of 24 requests, the first is '00023'"):
        measure(prompts, videopipe_renderer(lambda rs: list(render_all(rs))[1:], case, SIZE), None)


def test_wilson_interval_matches_published_values() -> None:
    low, high = wilson(0, 10)
    assert (low, round(high, 4)) == (0.0, 0.2775)
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, table I
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_exact() -> None:
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([True] * 6, [False] * 6) == 2 / 2**6
    assert mcnemar([True] * 10 + [False] * 2, [False] * 10 + [True] * 2) == pytest.approx(158 / 4096)


def test_psnr_and_ssim_equal_their_definitions() -> None:
    rng = np.random.default_rng(0)
    first = render(bench_prompts(1, seed=0, split="any", num_objects=1)[0].scene, 2, 48, 40)
    second = np.clip(first.astype(int) + rng.integers(-20, 21, first.shape), 0, 255).astype(np.uint8)
    mse = np.mean((first / 255 - second / 255) ** 2)
    assert psnr_db(first, second) == pytest.approx(-10 * math.log10(mse))
    wanted = np.mean(
        [
            structural_similarity(
                a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            for a, b in zip(first, second, strict=True)
        ]
    )
    assert ssim(first, second) == pytest.approx(wanted, abs=1e-6)
    assert ssim(first, first) == pytest.approx(1.0)


def test_cases_are_parsed_and_mistakes_named() -> None:
    case = parse_case("fast:steps=8,true_cfg=3,dtype=bfloat16,damage=0.1")
    assert case == Case(name="fast", steps=8, true_cfg=3.0, dtype="bfloat16", damage=0.1)
    assert parse_case("exact") == Case(name="exact")
    own = Case(name="own", renderer="videopipe", steps=8, overrides=("groups.dit_ranks=2", "attention.balance=rows"))
    assert parse_case("own:steps=8,groups.dit_ranks=2,attention.balance=rows") == own
    for text, message in (
        ("x:stps=8", "'stps=8' is not key=value with a key of renderer, steps"),
        ("x:steps=many", "steps='many' is no int"),
        ("x:steps=0", "steps=0 must be at least 1, nearest is 1"),
        ("x:renderer=magic", "renderer='magic' must be one of reference, videopipe, vae, truth"),
        ("x:renderer=vae,groups.dit_ranks=2", "'groups.dit_ranks=2' means nothing to vae"),
        ("x:renderer=videopipe,damage=1", "damage=1.0 needs renderer=reference"),
        ("x:damage=-1", "damage=-1.0 must not be negative"),
        (":steps=4", "has no name"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_case(text)
    with pytest.raises(ValueError, match="must have different names"):
        run_bench(
            bench_prompts(1, seed=0, split="any", num_objects=1), [Case(name="a"), Case(name="a")], lambda c: _reversed
        )
    with pytest.raises(ValueError, match="0 prompts and 1 cases"):
        run_bench([], [Case(name="a")], lambda c: _reversed)


def test_damage_is_repeatable_and_in_proportion() -> None:
    linear = [torch.nn.Linear(64, 64) for _ in range(2)]
    linear[1].load_state_dict(linear[0].state_dict())
    before = linear[0].weight.detach().clone()
    for module in linear:
        damage_weights(module, 0.1)
    assert torch.equal(linear[0].weight, linear[1].weight)
    assert float((linear[0].weight.detach() - before).std() / before.std()) == pytest.approx(0.1, rel=0.05)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moving_shapes(tmp_path_factory.mktemp("bench") / "model")


def test_bench_tells_steps_guidance_damage_and_ceilings_apart(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report" / "quality.json"
    cases = ["exact:steps=4", "again:steps=4", "fast:steps=2", "cfg:steps=4,true_cfg=3", "broken:steps=4,damage=0.5"]
    cases += ["vae:renderer=vae", "truth:renderer=truth"]
    arguments = [str(tiny_model), "--prompts", "3", "--frames", "5", "--height", "32", "--width", "32", "--batch", "2"]
    assert main([*arguments, *(a for c in cases for a in ("--case", c)), "--json", str(report)]) == 0
    assert capsys.readouterr().out.count("\n") == len(cases) + 2
    results = {r["case"]["name"]: r for r in json.loads(report.read_text())["results"]}
    assert results["again"]["identical"] == 3  # the same noise, whatever the case
    for name in ("fast", "cfg", "broken", "vae", "truth"):
        assert results[name]["identical"] == 0, name
        assert results[name]["psnr_db"]["mean"] < MAX_PSNR_DB
    assert results["truth"]["accuracy"]["background"]["share"] == 1.0
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        main([str(tmp_path)])


def test_videopipes_own_ranks_are_a_case_like_the_others(
    tiny_model: Path, tmp_path: Path, launcher: LocalLauncher
) -> None:
    report = tmp_path / "quality.json"
    cases = ["exact:steps=2", "own:steps=2,groups.dit_ranks=1,groups.vae_ranks=0", "other:steps=3,groups.vae_ranks=0"]
    arguments = [str(tiny_model), "--prompts", "2", "--frames", "5", "--height", "32", "--width", "32", "--batch", "1"]
    assert main([*arguments, *(a for c in cases for a in ("--case", c)), "--json", str(report)], launcher) == 0
    results = {r["case"]["name"]: r for r in json.loads(report.read_text())["results"]}
    assert results["own"]["identical"] == 2  # one DiT rank is bit-equal to diffusers
    assert results["other"]["identical"] == 0


def test_batch_size_does_not_change_the_clips(tiny_model: Path) -> None:
    prompts = bench_prompts(3, seed=0, split="held_out", num_objects=None)
    size = replace(SIZE, num_frames=5, height=32, width=32)
    case = Case(name="x", steps=2)
    one, three = (
        list(diffusers_renderer(tiny_model, case, size, torch.device("cpu"), batch)(prompts)) for batch in (1, 3)
    )
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(one, three, strict=True)) <= 1


def test_a_mistake_in_a_later_case_is_found_before_the_first(tiny_model: Path, tmp_path: Path) -> None:
    for case, message in (
        ("own:groups.dit_rank=2", r"case 'own': groups.dit_rank"),
        ("own:groups.dit_ranks=2,attention.balance=row", r"case 'own': attention.balance='row'"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(tiny_model), "--case", "exact:steps=2", "--case", case, "--json", str(tmp_path / "report.json")])
    with pytest.raises(ValueError, match=r"case 'exact': num_frames=16 .* nearest is 17"):
        main([str(tiny_model), "--frames", "16"])
    assert not (tmp_path / "report.json").exists()
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="is a WanPipeline, must be one of HunyuanVideoPipeline, OpenSoraPlanPipeline"):
        main([str(tmp_path)])


def test_the_report_is_there_before_the_last_case(prompts: list[BenchPrompt]) -> None:
    seen: list[int] = []

    def renderer_of(case: Case) -> Renderer:
        assert len(seen) == int(case.name)
        return truth_renderer(SIZE)

    run_bench(
        prompts[:2], [Case(name=str(i)) for i in range(3)], renderer_of, lambda results: seen.append(len(results))
    )
    assert seen == [1, 2, 3]


def test_open_sora_plan_is_benched_like_the_first_model(
    tmp_path: Path, launcher: LocalLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    model, report = tiny_open_sora_plan(tmp_path / "model"), tmp_path / "quality.json"
    cases = ["exact:steps=3", "own:steps=3,groups.vae_ranks=0", "plain:steps=3,guidance=1", "broken:steps=3,damage=0.5"]
    cases += ["fast:steps=2", "vae:renderer=vae"]
    arguments = [
        str(model),
        "--prompts",
        "2",
        "--frames",
        "5",
        "--height",
        "32",
        "--width",
        "32",
        "--json",
        str(report),
    ]
    assert main([*arguments, *(a for c in cases for a in ("--case", c))], launcher) == 0
    assert capsys.readouterr().out.count("\n") == len(cases) + 2
    results = {r["case"]["name"]: r for r in json.loads(report.read_text())["results"]}
    assert results["own"]["identical"] == 2  # one DiT rank is bit-equal to one process
    assert results["own"]["largest_difference"] == 0
    for name in ("plain", "broken", "fast", "vae"):
        assert results[name]["identical"] == 0, name
        assert results[name]["largest_difference"] > 0
    with pytest.raises(ValueError, match=r"case 'x': true_cfg_scale=3 must be 1: .* nearest is guidance_scale=3"):
        main([*arguments, "--case", "x:true_cfg=3"])
