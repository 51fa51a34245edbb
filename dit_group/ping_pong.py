"""Two evaluations of one model in turn on the same ranks: one computes while the other's attention travels.

An evaluation hands over where it would wait for other ranks: when q, k and v are on their way, before its attention
computes, and before it takes the attention's output. So the linear layers of one run under the exchanges of the other,
and under what helpers compute for it, without any cutting of heads into chunks:

    first   | q k v leave |             | attention |           | output, linear layers, q k v leave |        ...
    second                | q k v leave |           | attention |                                    | output ...

The other one always goes on next, whatever has arrived by then. So who starts which exchange when follows from the
program alone, and is the same on all ranks, as a process group needs it; helpers make the same calls in the same order
(`dit_group.assist`). Each evaluation does what it would do alone, to the bit.

The model is innocent of this: each evaluation is a call stack of its own, in a thread, and one of the two runs at a
time.

Source: it goes beyond attention co-processing of PipeDiT (arXiv 2511.12056), whose helpers are idle in linear layers.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dit_group.call import AttentionCall

T = TypeVar("T")
THREAD = "second evaluation"
"""The name of the thread that the second evaluation runs in."""


class Keeper(Protocol):
    """Holds something that belongs to the evaluation that runs, such as which sequence is the current one."""

    def leave(self) -> Any:
        """What is current: the evaluation that runs is about to pause."""

    def resume(self, state: Any) -> None:
        """Make that current again."""


class _AbandonedError(BaseException):
    """Unwinds an evaluation whose other one has failed; nothing in a model may catch it."""


class Turns(Generic[T]):
    """Runs two evaluations, which hand over to each other.

    Args:
        keepers: what they share, and each finds again as it left it.
        device: of the activations; both run on its current stream.
    """

    def __init__(self, keepers: Sequence[Keeper], device: torch.device) -> None:
        self._keepers = keepers
        self._device = device
        self._may_run = (threading.Semaphore(0), threading.Semaphore(0))
        self._has_ended = [False, False]
        self._running = 0
        self._error: BaseException | None = None  # of the one that failed first

    def run(self, first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
        """What both give; the first one begins, in the thread of the caller.

        Raises:
            BaseException: what one of them raised; the other one is abandoned.
        """
        found: dict[int, T] = {}

        def be(me: int, evaluate: Callable[[], T]) -> None:
            try:
                if self._error is None:
                    found[me] = evaluate()
            except BaseException as error:  # it goes to the caller's thread
                self._error = self._error or error
            self._has_ended[me] = True
            self._pass_on()

        environment = _environment(self._device)

        def be_second() -> None:
            self._may_run[1].acquire()
            with environment():
                be(1, second)

        thread = threading.Thread(target=be_second, name=THREAD, daemon=True)
        thread.start()
        be(0, first)
        thread.join()
        if self._error is not None:
            raise self._error
        return found[0], found[1]

    def hand_over(self) -> None:
        """The other evaluation goes on, until it hands over in turn; nothing where it has ended."""
        me = self._running
        if self._has_ended[1 - me]:
            return
        states = [keeper.leave() for keeper in self._keepers]
        self._pass_on()
        self._may_run[me].acquire()
        if self._error is not None:
            raise _AbandonedError
        for keeper, state in zip(self._keepers, states, strict=True):
            keeper.resume(state)

    def _pass_on(self) -> None:
        self._running = 1 - self._running
        self._may_run[self._running].release()


class CallInTurns:
    """One layer's attention that hands over before it computes and before it takes the output."""

    def __init__(self, call: AttentionCall, turns: Turns[Any]) -> None:
        self._call = call
        self._turns = turns

    def value(self, v: Tensor) -> None:
        """Send v [B, S_local, N, D] on its way."""
        self._call.value(v)

    def key(self, k: Tensor) -> None:
        """Send k on its way."""
        self._call.key(k)

    def query(self, q: Tensor) -> None:
        """Send q on its way."""
        self._call.query(q)

    def attend(self) -> None:
        """Compute, when the other evaluation has had its turn; the output begins to travel."""
        self._turns.hand_over()
        self._call.attend()

    def output(self) -> Tensor:
        """The attention of this member's tokens, all heads: [B, S_local, N, D], after another turn of the other."""
        self._turns.hand_over()
        return self._call.output()


def run_calls_in_turns(first: AttentionCall, second: AttentionCall, nothing: Tensor) -> None:
    """One layer of both evaluations for a helper, in the order in which members make the same calls.

    Also where two halves of the DiT group run one each, at the same time: each has a group of its own.

    Args:
        nothing: [B, 0, N, D], since a helper has no tokens.
    """
    calls = (first, second)
    for call in calls:
        call.value(nothing)
        call.key(nothing)
        call.query(nothing)
    for call in calls:
        call.attend()
    for call in calls:
        call.output()


def _environment(device: torch.device) -> Callable[[], Any]:
    """What torch keeps for each thread, as the caller of this has it: gradients, and on CUDA device and stream."""
    with_gradients = torch.is_grad_enabled()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def same() -> Iterator[None]:
        on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
        with torch.set_grad_enabled(with_gradients), on_stream:
            yield

    return same
