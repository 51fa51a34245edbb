"""Prompt files: every format gives the same requests, and every mistake is named with its line."""

import re
from pathlib import Path

import pytest

from pipelines.prompts import PromptLine, RequestDefaults, read_prompt_file
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest, default_id

DEFAULTS = RequestDefaults(height=48, width=64, num_frames=9, num_inference_steps=4, seed=7, negative_prompt="blurry")


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


TXT = "# prompts\n\na red fox\n  eine Möwe über dem Meer \n"
CSV = "prompt,seed\na red fox,\neine Möwe über dem Meer,\n"
JSONL = '{"prompt": "a red fox"}\n\n{"prompt": "eine Möwe über dem Meer", "seed": null}\n'


@pytest.mark.parametrize(("name", "text"), [("p.txt", TXT), ("p.csv", CSV), ("p.jsonl", JSONL), ("P.TXT", TXT)])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_every_format_gives_the_same_requests(tmp_path: Path, name: str, text: str, bom: bytes, line_end: str) -> None:
    path = write(tmp_path, name, bom + text.replace("\n", line_end).encode())
    spec = VideoSpec(height=48, width=64, num_frames=9, fps=24.0)
    assert read_prompt_file(path, DEFAULTS) == [
        VideoRequest(
            id=default_id(index, prompt, 7 + index),
            prompt=prompt,
            negative_prompt="blurry",
            spec=spec,
            num_inference_steps=4,
            guidance_scale=6.0,
            true_cfg_scale=1.0,
            seed=7 + index,
            max_sequence_length=256,
        )
        for index, prompt in enumerate(["a red fox", "eine Möwe über dem Meer"])
    ]


def test_a_line_overrides_every_default(tmp_path: Path) -> None:
    values = {
        "id": "fox",
        "negative_prompt": "dark",
        "height": 32,
        "width": 96,
        "num_frames": 5,
        "fps": 23.976,
        "num_inference_steps": 9,
        "guidance_scale": 1.5,
        "true_cfg_scale": 2.0,
        "seed": 123456789012345,
        "max_sequence_length": 77,
    }
    assert set(values) | {"prompt"} == set(PromptLine.__struct_fields__)
    header = ",".join(values)
    row = ",".join(str(v) for v in values.values())
    pairs = ", ".join(f'"{k}": ' + (f'"{v}"' if isinstance(v, str) else str(v)) for k, v in values.items())
    (from_csv,) = read_prompt_file(write(tmp_path, "p.csv", f'prompt,{header}\n"a, b",{row}\n'), DEFAULTS)
    (from_json,) = read_prompt_file(write(tmp_path, "p.jsonl", f'{{"prompt": "a, b", {pairs}}}'), DEFAULTS)
    assert from_csv == from_json
    assert from_csv.prompt == "a, b"
    spec = from_csv.spec
    for key, value in values.items():
        assert getattr(spec if key in VideoSpec.__struct_fields__ else from_csv, key) == value


def test_a_seed_on_a_line_wins_and_the_others_count_on(tmp_path: Path) -> None:
    text = '{"prompt": "a"}\n{"prompt": "b", "seed": 0}\n{"prompt": "c"}\n'
    requests = read_prompt_file(write(tmp_path, "p.jsonl", text), DEFAULTS)
    assert [r.seed for r in requests] == [7, 0, 9]
    assert [r.id for r in requests] == ["00000-a-7", "00001-b-0", "00002-c-9"]


def test_a_quoted_cell_may_hold_line_ends_and_lines_stay_right(tmp_path: Path) -> None:
    text = 'prompt,seed\n"a red\nfox",1\n\nb,-1\n'
    with pytest.raises(ValueError, match=r"p\.csv:5: seed=-1 .*nearest is 0"):
        read_prompt_file(write(tmp_path, "p.csv", text), DEFAULTS)
    requests = read_prompt_file(write(tmp_path, "p.csv", text.replace("-1", "2")), DEFAULTS)
    assert [r.prompt for r in requests] == ["a red\nfox", "b"]


def test_unusual_line_separators_stay_in_the_prompt(tmp_path: Path) -> None:
    (request,) = read_prompt_file(write(tmp_path, "p.txt", "a\u2028b\n"), DEFAULTS)
    assert request.prompt == "a\u2028b"
    assert len("a\u2028b\n".splitlines()) == 2  # the twin


def test_equal_prompts_have_their_own_ids(tmp_path: Path) -> None:
    requests = read_prompt_file(write(tmp_path, "p.txt", "fox\nfox\n" * 3), DEFAULTS)
    assert len({r.id for r in requests}) == 6


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt,num_frame\na,9\n", "p.csv:1: unknown key 'num_frame', nearest is 'num_frames'"),
        ("p.csv", "promt\na\n", "p.csv:1: unknown key 'promt', nearest is 'prompt'"),
        ("p.csv", "seed\n1\n", "p.csv:1: no column 'prompt', found seed"),
        ("p.csv", "prompt,seed,seed\na,1,2\n", "p.csv:1: column 'seed' appears twice"),
        ("p.csv", "prompt,seed\na,1\nb,x\n", "p.csv:3: seed='x': Expected `int | null`, got `str`"),
        ("p.csv", "prompt,seed\na,1.5\n", "p.csv:2: seed='1.5': Expected `int | null`"),
        ("p.csv", "prompt,guidance_scale\na,nan\n", "p.csv:2: guidance_scale=nan must be finite, nearest is 6.0"),
        ("p.csv", "prompt,seed\na fox, red,1\n", "p.csv:2: 3 cells, the header has 2; quote a cell"),
        ("p.csv", "prompt,seed\na\n", "p.csv:2: 1 cells, the header has 2"),
        ("p.csv", 'prompt\n"a\n', "p.csv:2: unexpected end of data"),
        ("p.csv", "prompt,seed\n,1\n", "p.csv:2: prompt='' is empty"),
        ("p.csv", "prompt,seed\n", "p.csv: holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "sed": 1}', "p.jsonl:2: unknown key 'sed', nearest is 'seed'"),
        ("p.jsonl", '{"prompt": "a", "seed": "1"}', "p.jsonl:1: seed='1': Expected `int | null`, got `str`"),
        ("p.jsonl", '{"prompt": "a", "fps": true}', "p.jsonl:1: fps=True: Expected `float | null`, got `bool`"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl:1: prompt=3: Expected `str`, got `int`"),
        ("p.jsonl", '{"seed": 3}', "p.jsonl:1: Object missing required field `prompt`"),
        ("p.jsonl", '{"prompt": "  "}', "p.jsonl:1: prompt='  ' is empty"),
        ("p.jsonl", '\n{"prompt": "a"', "p.jsonl:2: Input data was truncated"),
        ("p.jsonl", '["a"]', "p.jsonl:1: need an object"),
        ("p.jsonl", '{"prompt": "a", "num_inference_steps": 0}', "p.jsonl:1: num_inference_steps=0 must be at least 1"),
        ("p.jsonl", '{"prompt": "a", "id": "a/b"}', "nearest is 'a-b'"),
        (
            "p.jsonl",
            '{"prompt": "a", "id": "x"}\n\n{"prompt": "b", "id": "x"}',
            "p.jsonl:3: id='x' is already the id of line 1",
        ),
        ("p.txt", "# nothing\n\n", "p.txt: holds no prompt"),
        ("p.txt", "", "p.txt: holds no prompt"),
        ("p.csv", "", "p.csv: holds no prompt"),
        ("p.txt", b"fox\nM\xf6we\n", "p.txt:2: not UTF-8 (byte 0xf6)"),
        ("p.json", "[]", "extension='.json' must be one of .txt, .csv, .jsonl, nearest is '.jsonl'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompt_file(write(tmp_path, name, text), DEFAULTS)


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prompt_file(tmp_path / "none.txt", DEFAULTS)
