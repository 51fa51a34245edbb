"""The control plane: typed messages over ZeroMQ between the engine and its ranks. No pickle, no tensors of the model.

The engine binds a ROUTER, each rank connects a DEALER. A rank's address holds the token of the run, so a stranger that
finds the port is not listened to. Messages to one rank arrive in the order they were sent.
"""

import msgspec
import zmq

from videopipe.messages import Envelope, ToRank


class ControlServer:
    """The engine's end. Not thread-safe: one thread owns it."""

    def __init__(self, address: str, token: str) -> None:
        """Bind `address`, such as `ipc:///run/dir/control` or `tcp://10.0.0.1:0` (any free port)."""
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.bind(address)
        self.endpoint: str = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.ignored = 0  # messages under the token of the run that could not be read
        self._token = token
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Envelope)

    def send(self, rank: int, message: ToRank, payload: bytes | None = None) -> bool:
        """Queue a message for a rank; False where that rank is not connected (any more)."""
        parts: list[bytes] = [_address(self._token, rank, "main"), self._encoder.encode(message)]
        if payload is not None:
            parts.append(payload)
        try:
            self.socket.send_multipart(parts)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def receive(self) -> list[tuple[int, Envelope, bytes | None]]:
        """All messages that have arrived, with the rank that sent them.

        Strangers are not listened to; malformed messages are counted in `ignored`.
        """
        arrived: list[tuple[int, Envelope, bytes | None]] = []
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return arrived
            rank = _rank_of(parts[0], self._token)
            if rank is None:
                continue
            if len(parts) not in (2, 3):
                self.ignored += 1
                continue
            try:
                envelope = self._decoder.decode(parts[1])
            except msgspec.DecodeError:
                self.ignored += 1
                continue
            arrived.append((rank, envelope, parts[2] if len(parts) == 3 else None))

    def close(self) -> None:
        """Drop what is not sent yet and free the socket."""
        self.socket.close(linger=200)
        self._context.term()


class ControlClient:
    """A rank's end. `channel` is `main`, or `beat` for the heartbeat thread; each thread needs a client of its own."""

    def __init__(self, endpoint: str, token: str, rank: int, channel: str = "main") -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, _address(token, rank, channel))
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)

    def send(self, envelope: Envelope, payload: memoryview | bytes | None = None) -> None:
        """Queue a message for the engine."""
        parts: list[memoryview | bytes] = [self._encoder.encode(envelope)]
        if payload is not None:
            parts.append(payload)
        self.socket.send_multipart(parts, copy=payload is None)

    def receive(self, timeout_s: float | None = None) -> tuple[ToRank, bytes | None] | None:
        """The next message, or None after `timeout_s` (None waits for ever)."""
        if not self.socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        parts = self.socket.recv_multipart()
        return self._decoder.decode(parts[0]), parts[1] if len(parts) > 1 else None

    def close(self) -> None:
        """Give what is queued a moment to leave, then free the socket."""
        self.socket.close(linger=2000)
        self._context.term()


def _address(token: str, rank: int, channel: str) -> bytes:
    return f"{token}/{channel}/{rank}".encode()


def _rank_of(address: bytes, token: str) -> int | None:
    parts = address.decode("ascii", errors="replace").split("/")
    if len(parts) != 3 or parts[0] != token or parts[1] not in ("main", "beat") or not parts[2].isdecimal():
        return None
    return int(parts[2])
