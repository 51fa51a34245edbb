"""What the engine and the ranks say to each other: small typed structs as MessagePack; tensors travel beside them."""

from typing import Any, Literal

import msgspec

from videopipe.arrangement import Arrangement, Calibration, Guidance, Rules, Shape
from videopipe.records import VideoRequest
from videopipe.trace import Span

# ---- engine -> rank ------------------------------------------------------------------------------------------------


class LoadParts(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load the parts of the model that this rank needs. Ranks of one host are told one after the other."""

    text_encoder: bool
    denoiser: bool
    decoder: bool


class EncodePrompt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Encode a prompt and send the conditioning to `dit_ranks`. A payload holds conditioning given by the caller."""

    request: VideoRequest
    dit_ranks: tuple[int, ...]
    transfer: int


class BeginDenoise(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Receive `nbytes` of conditioning from `source`, make the noise. A payload holds noise given by the caller.

    `record_to`: the folder `<id>.steps` for what each step computes, None for no recording; `record_blocks`: so many
    blocks of the DiT with it.
    """

    request: VideoRequest
    source: int
    nbytes: int
    transfer: int
    record_to: str | None = None
    record_blocks: int = 0


class RunStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run one denoising step; `helpers` take a share of its attention."""

    request: str
    step: int
    helpers: tuple[int, ...] = ()


class PrepareAssist(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a VAE rank: steps of this request may want its help.

    `text_masks`: 0 and 1 for each text token, by branch. `recorded`: its steps are recorded.
    """

    request: VideoRequest
    text_masks: tuple[bytes, ...]
    recorded: bool = False


class AssistStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a VAE rank that is lent: take part in the attention of one denoising step."""

    request: str
    step: int
    helpers: tuple[int, ...]


class Calibrate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To DiT ranks and helpers, while nothing else runs: time what `rules` leave open, in about `budget_s` seconds."""

    shape: Shape
    rules: Rules
    budget_s: float


class Arrange(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To DiT ranks and helpers: sequences of so many video tokens are laid out in these ways from now on.

    Those of evaluations that are guided so.
    """

    num_video: int
    guidance: Guidance
    arrangements: tuple[Arrangement, ...]


class FinishDenoise(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bring the finished latents to host memory on the leader and free the state."""

    request: str


class AbandonRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget a cancelled request."""

    request: str


class SendLatents(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Send finished latents to each member of a team; keep them until they are released."""

    request: str
    to: tuple[int, ...]
    transfer: int


class DecodeLatents(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Receive latents of `shape` (float32) from `source`, acknowledge, decode with the other members of the team.

    `result`: uint8 frames, float32 frames in 0..1 for callers that asked for them, or the latents themselves.
    `path`: the file for the result, see `videopipe.handover`; None to send it as payloads, since the engine runs on
    another host. `keep_latents`: in host memory, until `EndDelivery`.
    """

    request: VideoRequest
    source: int
    shape: tuple[int, ...]
    sequence: int
    transfer: int
    result: Literal["uint8", "float32", "latents"] = "uint8"
    path: str | None = None
    keep_latents: bool = False


class Release(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget what the receivers hold by now: the latents (leader) or the conditioning (encoder) of a request."""

    request: str
    what: Literal["latents", "conditioning"]


class EndDelivery(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget the latents that were kept while the clip was written; `return_latents`: it could not be, send them."""

    request: str
    return_latents: bool = False


class StopRank(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End the process in order."""


ToRank = (
    LoadParts
    | EncodePrompt
    | BeginDenoise
    | RunStep
    | PrepareAssist
    | AssistStep
    | Calibrate
    | Arrange
    | FinishDenoise
    | AbandonRequest
    | SendLatents
    | DecodeLatents
    | Release
    | EndDelivery
    | StopRank
)

# ---- rank -> engine ------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A rank is up and its process groups are ready. `clock_ns` is its monotonic clock at sending.

    `device_name`: the model of the device, since times measured on one do not hold on another.
    """

    pid: int
    host: str
    device: str
    clock_ns: int
    device_name: str = ""


class LoadedDecoder(msgspec.Struct, frozen=True, kw_only=True):
    """What a decode on this rank depends on: bytes free on its device, and what of the VAE tells how many it takes."""

    room_bytes: int
    vae: dict[str, Any]


class PartsLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The parts are loaded; bytes of weights by part, and the decoder, where there is one."""

    weight_bytes: dict[str, int]
    decoder: LoadedDecoder | None = None


class PromptEncoded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The conditioning is ready; so many bytes will be sent to each DiT rank.

    `text_masks` as in `PrepareAssist`.
    """

    request: str
    nbytes: int
    text_masks: tuple[bytes, ...] = ()


class StepCompleted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step has completed on the leader's device."""

    request: str
    step: int


class Calibrated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the leader: what was measured, and the choice."""

    calibration: Calibration


class LatentsReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Finished latents lie in the leader's host memory."""

    request: str


class StateFreed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A DiT rank other than the leader, or a helper, has finished with a request; brings its last spans."""

    request: str


class LatentsArrived(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The acknowledgement of a hand-over."""

    request: str
    sequence: int


class FramesReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rows `first_row` on, `rows` of them, of `count` frames from `first_frame` on are in the result's file.

    With a payload they are in there, in the result's dtype, for the engine to write.
    """

    request: str
    first_frame: int
    count: int
    first_row: int
    rows: int


class ResultReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """This rank has ended its share of a decode, its last kernel included; all its rows have been told before.

    `settings`: how it was decoded, in words; several where memory ran out in between, none where there was no choice.
    """

    request: str
    settings: tuple[str, ...] = ()


class LatentsReturned(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to `EndDelivery`: a payload holds the latents, float32 of `shape`."""

    request: str
    shape: tuple[int, ...]


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A rank cannot go on. `kind` is the exception's class; `out_of_memory` tells the usual one apart."""

    kind: str
    message: str
    traceback: str
    stage: str
    request: str | None
    step: int | None
    out_of_memory: bool


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent by a thread of its own: alive, and what the main thread has been doing for how long.

    `waiting` tells that the rank waits for others (a collective, a transfer): it is not the one that hangs. `where` is
    the innermost line of our own code that the main thread is in.
    """

    stage: str | None
    request: str | None
    step: int | None
    seconds: float
    waiting: bool
    where: str


FromRank = (
    Hello
    | PartsLoaded
    | PromptEncoded
    | StepCompleted
    | Calibrated
    | LatentsReady
    | StateFreed
    | LatentsArrived
    | FramesReady
    | ResultReady
    | LatentsReturned
    | RankFailed
    | Heartbeat
)


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a rank sends: the message, the spans it finished since the last one, and its peak memory so far."""

    message: FromRank
    spans: tuple[Span, ...] = ()
    peak_memory_bytes: int = 0
