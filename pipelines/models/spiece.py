"""Reads sentencepiece model files (`spiece.model`) without the sentencepiece package: a list of pieces with scores.

Source: the file format is the protocol buffer `ModelProto` of github.com/google/sentencepiece; the wire format is that
of protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_UNIGRAM = 1


class PieceKind(IntEnum):
    """What a piece of the vocabulary is; the numbers are those of the file format."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """A vocabulary: (text, log probability, kind) of each piece, whose index is its id, and the normalisation table."""

    pieces: tuple[tuple[str, float, PieceKind], ...]
    charsmap: bytes


def read_spiece(path: Path) -> SentencePieceModel:
    """Read a unigram sentencepiece model.

    Raises:
        ValueError: the file is not one.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = tuple(_piece(value) for number, value in fields if number == _PIECES and isinstance(value, bytes))
        trainer = _last(fields, _TRAINER)
        normalizer = _last(fields, _NORMALIZER)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    kind = next((value for number, value in _fields(trainer) if number == 3), _UNIGRAM)
    if kind != _UNIGRAM:
        raise ValueError(f"{path} holds a sentencepiece model of type {kind!r}, must be unigram ({_UNIGRAM})")
    if not any(kind is PieceKind.UNKNOWN for _, _, kind in pieces):
        raise ValueError(f"{path} is not a sentencepiece model: none of its {len(pieces)} pieces is the unknown one")
    return SentencePieceModel(pieces=pieces, charsmap=_last(list(_fields(normalizer)), 2))


def spiece_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a `spiece.model` as T5 and mT5 use it: `</s>` appended, `<pad>` on the right.

    Raises:
        ValueError: the file is not a unigram sentencepiece model with these two pieces.
    """
    model = read_spiece(path)
    ids = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    for needed in ("</s>", "<pad>"):
        if needed not in ids:
            raise ValueError(f"{path} has no piece {needed!r}")
    unknown = next(i for i, (_, _, kind) in enumerate(model.pieces) if kind is PieceKind.UNKNOWN)
    backend = Tokenizer(models.Unigram([(text, score) for text, score, _ in model.pieces], unknown, False))
    table = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    squeeze = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence([*table, *squeeze])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", ids["</s>"])]
    )
    for text, _, kind in model.pieces:
        if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED):
            backend.add_tokens([AddedToken(text, normalized=False, special=kind is PieceKind.CONTROL)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=model.pieces[unknown][0],
        padding_side="right",
        model_max_length=2**30,
    )


def _piece(message: bytes) -> tuple[str, float, PieceKind]:
    text, score, kind = "", 0.0, PieceKind.NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = PieceKind(value)
    return text, score, kind


def _last(fields: list[tuple[int, bytes | int | float]], number: int) -> bytes:
    found = [value for field, value in fields if field == number and isinstance(value, bytes)]
    return found[-1] if found else b""


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """Field number and value of each field of a protocol buffer message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        value: bytes | int | float
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 1:
            value, at = struct.unpack_from("<d", message, at)[0], at + 8
        elif wire == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise IndexError(f"field {number} ends after the file")
            value, at = message[at : at + length], at + length
        elif wire == 5:
            value, at = struct.unpack_from("<f", message, at)[0], at + 4
        else:
            raise IndexError(f"field {number} has the unknown wire type {wire}")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
