"""Which rank failed, at what: from exits, error reports and heartbeats to one sentence."""

import msgspec

from pipelines.launch import RankEnded
from videopipe.config import FaultsConfig
from videopipe.messages import Heartbeat, RankFailed

TRANSFERS = (
    "videopipe/exchange.py",
    "videopipe/runtime.py",
    "vae_group/halo.py",
    "distributed/distributed_c10d.py",
)
"""Files whose functions wait for other ranks."""

GRACE_S = 0.4
"""How long after the first sign of a failure others are collected, so that the cause is told from its consequences."""


class Doing(msgspec.Struct, frozen=True):
    """What a rank is at: stage, request, step."""

    stage: str
    request: str | None = None
    step: int | None = None

    def describe(self) -> str:
        """` during denoise of request 'x', step 3`."""
        text = f" during {self.stage}"
        if self.request is not None:
            text += f" of request {self.request!r}"
        if self.step is not None:
            text += f", step {self.step}"
        return text


class RankError(RuntimeError):
    """A run that ended because a rank was lost. Names rank, stage, request and step; finished clips are not touched.

    `kind`: `killed`, `exited`, `raised`, `out_of_memory`, `silent` (no heartbeat), `hung` (no progress), `not_started`.
    """

    def __init__(self, rank: int, role: str, kind: str, what: str, doing: Doing, details: str = "") -> None:
        super().__init__(f"rank {rank} ({role}) {what}{doing.describe()}")
        self.rank = rank
        self.kind = kind
        self.stage = doing.stage
        self.request = doing.request
        self.step = doing.step
        self.details = details


class _Sign(msgspec.Struct, frozen=True):
    """One sign of a failure; the smallest `weight` names the cause."""

    weight: int
    order: int
    rank: int
    kind: str
    what: str
    doing: Doing
    details: str = ""


class FaultDetector:
    """Collects signs of failure. Time comes from the caller, in seconds of one monotonic clock."""

    def __init__(self, config: FaultsConfig, ranks: tuple[int, ...], now: float) -> None:
        self._config = config
        self._last_sign_of_life = dict.fromkeys(ranks, now)
        self._greeted: set[int] = set()
        self._beats: dict[int, Heartbeat] = {}
        self._signs: list[_Sign] = []
        self._first_sign: float | None = None
        self._last_check = now

    def alive(self, rank: int, now: float, beat: Heartbeat | None = None) -> None:
        """Something arrived from a rank."""
        self._last_sign_of_life[rank] = now
        if beat is None:
            self._greeted.add(rank)
        else:
            self._beats[rank] = beat

    def raised(self, rank: int, failure: RankFailed, now: float) -> None:
        """A rank reported that it cannot go on."""
        in_transfer = any(file in failure.traceback for file in TRANSFERS)
        what = f"raised {failure.kind}: {failure.message}"
        if failure.out_of_memory:
            what = f"ran out of memory ({failure.message})"
        doing = Doing(failure.stage, failure.request, failure.step)
        kind = "out_of_memory" if failure.out_of_memory else "raised"
        # an error inside a transfer is most often the echo of another rank's death; running out of memory never is
        echo = in_transfer and not failure.out_of_memory
        self._sign(3 if echo else 1, rank, kind, _one_line(what), doing, now, failure.traceback)

    def ended(self, news: RankEnded, doing: Doing, now: float) -> None:
        """A rank's process is gone, unasked."""
        if news.code < 0:
            self._sign(0, news.rank, "killed", news.describe(), doing, now)
        else:
            self._sign(2, news.rank, "exited", news.describe(), doing, now)

    def check(self, now: float, doing: dict[int, Doing]) -> _Sign | None:
        """The cause of a failure, once it is known; to be called several times a second.

        Args:
            doing: what the engine has told each rank to do, for ranks that can no longer say it themselves.
        """
        if now - self._last_check > 2.0:  # the engine itself was stopped for a while: nobody's silence counts
            self._last_sign_of_life = dict.fromkeys(self._last_sign_of_life, now)
        self._last_check = now
        for rank, last in self._last_sign_of_life.items():
            limit = self._config.heartbeat_timeout_s if rank in self._greeted else self._config.start_timeout_s
            if now - last > limit:
                kind = "silent" if rank in self._greeted else "not_started"
                what = f"gave no sign of life for {now - last:.0f} s"
                self._sign(1, rank, kind, what, doing.get(rank, Doing("start")), now)
        self._check_progress(now)
        if self._first_sign is None or now - self._first_sign < GRACE_S:
            return None
        return min(self._signs, key=lambda sign: (sign.weight, sign.order))

    def _check_progress(self, now: float) -> None:
        limit = self._config.hang_timeout_s
        late = {r: b for r, b in self._beats.items() if b.stage is not None and b.seconds > limit}
        for rank, beat in late.items():
            culprit = not beat.waiting
            assert beat.stage is not None
            what = f"made no progress for {beat.seconds:.0f} s (at {beat.where})"
            self._sign(1 if culprit else 4, rank, "hung", what, Doing(beat.stage, beat.request, beat.step), now)

    def _sign(self, weight: int, rank: int, kind: str, what: str, doing: Doing, now: float, details: str = "") -> None:
        if any(sign.rank == rank and sign.kind == kind for sign in self._signs):
            return
        if self._first_sign is None:
            self._first_sign = now
        self._signs.append(_Sign(weight, len(self._signs), rank, kind, what, doing, details))


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else text
