"""Prompt files: txt, csv and jsonl into requests, refusing what is misspelt with file and line."""

import csv
import difflib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest, default_id


class RequestDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a line of a prompt file may leave out; fields as in `VideoRequest` and `VideoSpec`."""

    height: int
    width: int
    num_frames: int
    fps: float = 24.0
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    true_cfg_scale: float = 1.0
    negative_prompt: str | None = None
    seed: int = 0
    max_sequence_length: int = 256


class PromptLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line as written: absent fields take the default of the file's `RequestDefaults`."""

    prompt: str
    id: str | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int | None = None
    max_sequence_length: int | None = None


def read_prompt_file(path: Path, defaults: RequestDefaults) -> list[VideoRequest]:
    """The requests of a prompt file, in the order of its lines.

    `.txt` holds one prompt per line; blank lines and lines that start with `#` are skipped. `.csv` has a header row
    with a column `prompt` and any of the other fields of `PromptLine`; an empty cell takes the default. `.jsonl` holds
    one object per line with the same keys; null takes the default. UTF-8, with or without byte order mark, any line
    end.

    The prompt with index k (from 0, counting prompts, not lines) gets the seed `defaults.seed + k`; a seed given on its
    line wins. Its id is `default_id(k, prompt, seed)`; an id given on its line wins and must be unique.

    Raises:
        ValueError: names file, line, field, value and the nearest valid value or key. Sizes are checked against the
            model later, where its geometry is known.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() not in READERS:
        near = _nearest(path.suffix.lower(), list(READERS))
        raise ValueError(f"{path}: extension={path.suffix!r} must be one of {', '.join(READERS)}, nearest is {near!r}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from error

    requests: list[VideoRequest] = []
    lines_of_ids: dict[str, int] = {}
    for line, fields in READERS[path.suffix.lower()](text, path):
        where = f"{path}:{line}: "
        for field in ("fps", "guidance_scale", "true_cfg_scale"):
            value = getattr(fields, field)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{where}{field}={value} must be finite, nearest is {getattr(defaults, field)}")
        request = _request(len(requests), fields, defaults)
        if not request.prompt.strip():
            raise ValueError(f"{where}prompt={request.prompt!r} is empty")
        request.check(where)
        if request.id in lines_of_ids:
            raise ValueError(f"{where}id={request.id!r} is already the id of line {lines_of_ids[request.id]}")
        lines_of_ids[request.id] = line
        requests.append(request)
    if not requests:
        raise ValueError(f"{path}: holds no prompt, need at least one")
    return requests


def _request(index: int, line: PromptLine, defaults: RequestDefaults) -> VideoRequest:
    fields = msgspec.structs.asdict(defaults)
    fields["seed"] += index
    fields |= {key: value for key, value in msgspec.structs.asdict(line).items() if value is not None}
    spec = VideoSpec(**{key: fields.pop(key) for key in VideoSpec.__struct_fields__})
    fields.setdefault("id", default_id(index, line.prompt, fields["seed"]))
    return VideoRequest(spec=spec, **fields)


def _read_txt(text: str, path: Path) -> Iterator[tuple[int, PromptLine]]:
    for line, row in enumerate(_lines(text), start=1):
        if row.strip() and not row.lstrip().startswith("#"):
            yield line, PromptLine(prompt=row.strip())


def _read_jsonl(text: str, path: Path) -> Iterator[tuple[int, PromptLine]]:
    for line, row in enumerate(_lines(text), start=1):
        if not row.strip():
            continue
        try:
            item = msgspec.json.decode(row)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if not isinstance(item, dict):
            raise ValueError(
                f'{path}:{line}: need an object such as {{"prompt": "a red fox"}}, found {row.strip()[:60]}'
            )
        yield line, _prompt_line(item, f"{path}:{line}: ", strict=True)


def _read_csv(text: str, path: Path) -> Iterator[tuple[int, PromptLine]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1  # where a row begins: a quoted cell may hold line ends
    header: list[str] | None = None
    try:
        for row in rows:
            begin, line = line, rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [cell.strip() for cell in row]
                _check_header(header, f"{path}:{begin}: ")
                continue
            if len(row) != len(header):
                hint = "; quote a cell that holds a comma" if len(row) > len(header) else ""
                raise ValueError(f"{path}:{begin}: {len(row)} cells, the header has {len(header)}{hint}")
            cells = {key: cell for key, cell in zip(header, row, strict=True) if cell.strip()}
            yield begin, _prompt_line({"prompt": "", **cells}, f"{path}:{begin}: ", strict=False)
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: {error}") from error


# One line for one format: name of the extension, reader of its text.
READERS: dict[str, Callable[[str, Path], Iterator[tuple[int, PromptLine]]]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}


def _check_header(header: list[str], where: str) -> None:
    for key in header:
        if header.count(key) > 1:
            raise ValueError(f"{where}column {key!r} appears twice")
        _check_key(key, where)
    if "prompt" not in header:
        raise ValueError(f"{where}no column 'prompt', found {', '.join(header)}")


def _prompt_line(item: dict[str, object], where: str, *, strict: bool) -> PromptLine:
    """Convert what a line holds; `strict=False` also takes numbers written as text, as csv has nothing else."""
    for key in item:
        _check_key(key, where)
    try:
        return msgspec.convert(item, PromptLine, strict=strict)
    except msgspec.ValidationError as error:
        # msgspec names the path but not the value
        reason, _, field = str(error).partition(" - at `$.")
        field = field.rstrip("`")
        raise ValueError(f"{where}{field}={item[field]!r}: {reason}" if field else f"{where}{reason}") from error


def _check_key(key: str, where: str) -> None:
    fields = PromptLine.__struct_fields__
    if key not in fields:
        raise ValueError(f"{where}unknown key {key!r}, nearest is {_nearest(key, fields)!r}")


def _lines(text: str) -> list[str]:
    # not splitlines(): it also splits at U+2028 and the like, which may stand in a prompt
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _nearest(name: str, valid: Sequence[str]) -> str:
    return (difflib.get_close_matches(name, valid, n=1, cutoff=0.0) or list(valid))[0]
