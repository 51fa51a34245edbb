"""Configurations: every key is there, every mistake is one line with the nearest valid value, TOML survives a trip."""

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videopipe.config import Config, ConfigError, check_config, load_config, to_toml

# The keys of the design that exist today, as `--set` paths, with a value other than the default.
KEYS = {
    "model.family": "open-sora-plan",
    "model.weights": "some/where",
    "model.revision": "main",
    "model.dtype": "bfloat16",
    "model.vae_dtype": "float16",
    "model.text_encoder_dtype": "float16",
    "model.attention_kernel": "math",
    "groups.dit_ranks": 7,
    "groups.vae_ranks": 2,
    "groups.text_encoder": "vae",
    "schedule.policy": "decoupled",
    "schedule.mode": "deterministic",
    "attention.strategy": "ulysses",
    "attention.text": "trimmed",
    "queue.capacity": 3,
    "queue.capacity_bytes": 1000,
    "queue.max_undelivered": 1,
    "decode.mode": "tiles",
    "decode.tiling": True,
    "output.format": "npy",
    "output.codec": "libx265",
    "output.crf": 30,
    "output.pixel_format": "yuv444p",
    "output.fps": 23.976,
    "request.height": 480,
    "request.seed": 12,
    "request.negative_prompt": "dark",
    "request.guidance_scale": 1.5,
    "runtime.device": "cpu",
    "runtime.threads_per_rank": 1,
    "faults.hang_timeout_s": 30.0,
}


def value_at(config: Config, path: str) -> object:
    table, key = path.split(".")
    return getattr(getattr(config, table), key)


@pytest.mark.parametrize("path", KEYS)
def test_every_key_can_be_set_from_file_and_command_line(path: str, tmp_path: Path) -> None:
    text = msgspec.json.encode(KEYS[path]).decode()
    others = ["groups.vae_ranks=1"]
    assert value_at(load_config(None, [*others, f"{path}={text}"]), path) == KEYS[path]
    table, key = path.split(".")
    file = tmp_path / "a.toml"
    file.write_text(f"[{table}]\n{key} = {text}\n")
    assert value_at(load_config(file), path) == KEYS[path]
    assert value_at(load_config(str(file)), path) == KEYS[path]
    assert value_at(load_config({table: {key: KEYS[path]}}), path) == KEYS[path]


def test_the_command_line_wins_over_the_file_and_the_last_word_counts(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[groups]\ndit_ranks = 2\nvae_ranks = 3\n")
    config = load_config(file, ["groups.dit_ranks=4", " groups.dit_ranks = 5 "])
    assert (config.groups.dit_ranks, config.groups.vae_ranks) == (5, 3)


def test_a_mapping_is_not_changed_by_overrides() -> None:
    source = {"groups": {"dit_ranks": 2}}
    load_config(source, ["groups.dit_ranks=4", "queue.capacity=1"])
    assert source == {"groups": {"dit_ranks": 2}}


def test_bare_words_are_text_and_a_value_may_hold_an_equals_sign() -> None:
    assert load_config(None, ["model.weights=out/my=model"]).model.weights == "out/my=model"
    assert load_config(None, ['model.weights="7"']).model.weights == "7"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["groups.dit_rank=2"], "groups.dit_rank=2 is not a known key, nearest is groups.dit_ranks"),
        (["grups.dit_ranks=2"], "grups={'dit_ranks': 2} is not a known key, nearest is groups"),
        (["groups.dit_ranks=two"], "groups.dit_ranks='two' must be a whole number, nearest is 1"),
        (["groups.dit_ranks='3'"], "groups.dit_ranks='3' must be a whole number, nearest is 3"),
        (["groups.dit_ranks=2.5"], "groups.dit_ranks=2.5 must be a whole number, nearest is 2"),
        (["groups.dit_ranks=true"], "groups.dit_ranks=True must be a whole number"),
        (["groups.dit_ranks=0"], "groups.dit_ranks=0 must be at least 1, nearest is 1"),
        (["groups.vae_ranks=-1"], "groups.vae_ranks=-1 must be at least 0, nearest is 0"),
        (["groups.dit_ranks=inf"], "groups.dit_ranks=inf must be a whole number, nearest is 1"),
        (["queue.capacity=0"], "queue.capacity=0 must be at least 1, nearest is 1"),
        (["queue.capacity_bytes=0"], "queue.capacity_bytes=0 must be at least 1"),
        (["queue.max_undelivered=0"], "queue.max_undelivered=0 must be at least 1"),
        (["runtime.threads_per_rank=-1"], "runtime.threads_per_rank=-1 must be at least 0, nearest is 0"),
        (["faults.hang_timeout_s=0.5"], "faults.hang_timeout_s=0.5 must be at least 1, nearest is 1"),
        (["faults.heartbeat_timeout_s=0"], "faults.heartbeat_timeout_s=0.0 must be at least 1"),
        (["faults.start_timeout_s=-3"], "faults.start_timeout_s=-3.0 must be at least 1"),
        (["faults.start_timeout_s=soon"], "faults.start_timeout_s='soon' must be a number, nearest is 120.0"),
        (["output.fps=fast"], "output.fps='fast' must be a number, nearest is 24.0"),
        (["request.guidance_scale=nan"], "request.guidance_scale=nan must be finite, nearest is 6.0"),
        (["faults.hang_timeout_s=inf"], "faults.hang_timeout_s=inf must be finite, nearest is 600.0"),
        (["output.fps=true"], "output.fps=True must be a number"),
        (["output.crf=52"], "output.crf=52 must be 0 to 51, nearest is 51"),
        (["output.crf=-1"], "output.crf=-1 must be 0 to 51, nearest is 0"),
        (["decode.tiling=yes"], "decode.tiling='yes' must be true or false, nearest is true"),
        (["decode.tiling=0"], "decode.tiling=0 must be true or false, nearest is false"),
        (["model.dtype=fp16"], "model.dtype='fp16' must be one of 'float32', 'bfloat16', 'float16'; nearest is"),
        (["model.vae_dtype=half"], "model.vae_dtype='half' must be one of"),
        (["model.weights=3"], "model.weights=3 must be text, nearest is '3'"),
        (["model.revision=3"], "model.revision=3 must be text, nearest is '3'"),
        (["schedule.policy=decopled"], "schedule.policy='decopled' must be one of"),
        (["schedule.policy=true"], "schedule.policy=True must be one of"),
        (["schedule.policy=decoupled", "groups.vae_ranks=0"], "groups.vae_ranks=0 cannot be decoupled"),
        (["schedule.policy=colocated"], "groups.vae_ranks=1 would idle"),
        (["groups.text_encoder=vae", "groups.vae_ranks=0"], "groups.text_encoder='vae' needs a VAE group"),
        (["groups=3"], "--set 'groups=3' must look like table.key=value"),
        (["groups.dit_ranks"], "--set 'groups.dit_ranks' must look like table.key=value"),
        (["groups.=3"], "must look like table.key=value"),
        (["groups.dit_ranks.n=3"], "groups.dit_ranks={'n': 3} must be a whole number"),
        (["groups.dit_ranks=1", "groups.dit_ranks.n=3"], "groups.dit_ranks.n=3: dit_ranks is a value, not a table"),
        (["request.height=" + "9" * 200 + "x"], "..."),
    ],
)
def test_mistakes_on_the_command_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[groups]\ndit_ranks = 'x'\n", "groups.dit_ranks='x' must be a whole number"),
        ("groups = 3\n", "groups=3 must be a table, as in [groups]"),
        ("[groups\n", "is not TOML: "),
        ("[a]\nx = 1\n[a]\ny = 1\n", "is not TOML: "),
        ("dit_ranks = 3\n", "dit_ranks=3 is not a known key"),
        ("[request]\nheigth = 64\n", "request.heigth=64 is not a known key, nearest is request.height"),
        ("[[groups]]\ndit_ranks = 3\n", "groups=[{'dit_ranks': 3}] must be a table"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "hunyuan.toml").write_text("")
    with pytest.raises(ConfigError, match=r"hunjuan.toml' does not exist, nearest is .*hunyuan\.toml"):
        load_config(tmp_path / "hunjuan.toml")
    with pytest.raises(ConfigError, match=r"none/a.toml' does not exist$"):
        load_config(tmp_path / "none" / "a.toml")
    with pytest.raises(ConfigError, match="cannot be read: "):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"a = '\xf6'")
    with pytest.raises(ConfigError, match="cannot be read: "):
        load_config(tmp_path / "latin.toml")


def test_a_struct_built_by_hand_is_checked_too() -> None:
    good = load_config()
    check_config(good)
    bad = msgspec.structs.replace(good, groups=msgspec.structs.replace(good.groups, dit_ranks=0))
    with pytest.raises(ConfigError, match=r"groups\.dit_ranks=0"):
        check_config(bad)


@pytest.mark.parametrize(
    ("overrides", "policy", "trimmed", "ranks"),
    [
        ([], "decoupled", False, 2),
        (["groups.vae_ranks=0"], "colocated", False, 1),
        (["groups.dit_ranks=3"], "decoupled", True, 4),
        (["groups.dit_ranks=3", "attention.text=padded"], "decoupled", False, 4),
        (["attention.text=trimmed"], "decoupled", True, 2),
        (["schedule.policy=decoupled"], "decoupled", False, 2),
    ],
)
def test_what_auto_means(overrides: list[str], policy: str, trimmed: bool, ranks: int) -> None:
    config = load_config(None, overrides)
    assert (config.policy, config.text_trimmed, config.world_size) == (policy, trimmed, ranks)


def test_spec_takes_the_configured_size() -> None:
    spec = load_config(None, ["request.height=64", "request.width=96", "request.num_frames=5", "output.fps=8"]).spec()
    assert (spec.height, spec.width, spec.num_frames, spec.fps) == (64, 96, 5, 8.0)


# -- TOML -------------------------------------------------------------------------------------------------------------


def test_every_key_survives_a_round_trip(tmp_path: Path) -> None:
    overrides = [f"{path}={msgspec.json.encode(value).decode()}" for path, value in KEYS.items()]
    config = load_config(None, overrides)
    file = tmp_path / "a.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config
    assert config != load_config(), "the twin: the values were not the defaults"


@given(
    weights=st.text(st.characters(codec="utf-8"), max_size=20),
    fps=st.floats(0.001, 1000),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_text_and_number_survives(
    tmp_path_factory: pytest.TempPathFactory, weights: str, fps: float, seed: int
) -> None:
    config = load_config({"model": {"weights": weights}, "output": {"fps": fps}, "request": {"seed": seed}})
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config


def test_toml_holds_one_table_for_each_part() -> None:
    tables = re.findall(r"^\[(\w+)\]$", to_toml(load_config()), re.MULTILINE)
    assert tables == list(Config.__struct_fields__)
