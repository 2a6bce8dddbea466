"""A policy that runs elsewhere. numpy, websockets and msgpack only: the computer beside the arm has no torch.

with RemotePolicy("ws://127.0.0.1:8000", robot) as policy:
    result = infer(policy, observation, context)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from policies.remote import packing, protocol
from policies.remote.protocol import Hello
from vla.embodiment import Embodiment
from vla.errors import ConfigError, ObservationError, TransportError, explain
from vla.policy import InferContext, InferResult
from vla.types import Observation

TOKEN_VARIABLE = "VLA_POLICY_TOKEN"
_RETRY_S = 0.2
_MAX_ANSWER_BYTES = 16 * 2**20


class RemotePolicy:
    """The policy that a `vla serve` at `address` runs, observation by observation.

    address: ws://HOST:PORT or wss://HOST:PORT. robot: refuse a policy made for another one; None takes any. token:
    None for the one in $VLA_POLICY_TOKEN, if any. authority: PEM file of who signed the server's certificate; None for
    those that the system trusts. timeout_s: the longest that one inference may take, connecting anew included. wait_s:
    how long to wait for a server that is not there yet.

    A connection that broke is made again once per inference, and must lead to the same policy. After a timeout it is
    dropped: a late answer never stands for another observation. One inference runs at a time; others wait.

    Raises TransportError when there is no server, or none that speaks this protocol, EmbodimentMismatch for another
    robot, and what the policy itself raises.
    """

    def __init__(
        self,
        address: str,
        robot: Embodiment | None = None,
        *,
        token: str | None = None,
        authority: str | Path | None = None,
        timeout_s: float = 10.0,
        wait_s: float = 0.0,
    ):
        if not address.startswith(("ws://", "wss://")):
            raise ConfigError(explain("address", "ws://HOST:PORT or wss://HOST:PORT", repr(address), "Correct it."))
        self.address, self._timeout_s = address, timeout_s
        self._token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        self._tls = _tls(authority) if address.startswith("wss://") else None
        self._seed = 0
        self._turn = threading.Lock()
        self._connection: ClientConnection | None = None
        until = time.monotonic() + wait_s
        while True:
            try:
                self._connection, self.hello = self._connect(time.monotonic() + timeout_s)
                break
            except _NotThere:
                if time.monotonic() >= until:
                    raise
                time.sleep(_RETRY_S)
        if robot is not None:
            try:
                robot.require_same(self.hello.embodiment, f"robot {robot.name!r} and the policy at {address}")
            except BaseException:
                self.close()
                raise

    @property
    def embodiment(self) -> Embodiment:
        return self.hello.embodiment

    @property
    def horizon(self) -> int:
        return self.hello.horizon

    @property
    def identity(self) -> str:
        """What decides its answers: the bundle of the server and what it is run with."""
        return f"{self.hello.fingerprint or self.hello.policy} {json.dumps(self.hello.parts, sort_keys=True)}"

    def reset(self, seed: int) -> None:
        """The server keeps nothing: the seed goes along with every observation."""
        self._seed = seed

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        """One after the other, each as if alone. The times of a result include "wait" (for its batch on the server) and
        "round_trip", milliseconds."""
        return [self._infer(observation, context) for observation, context in zip(observations, contexts)]

    def close(self) -> None:
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- one inference ----
    def _infer(self, observation: Observation, context: InferContext) -> InferResult:
        images = {name: observation.images[name] for name in self.embodiment.camera_names if name in observation.images}
        request = protocol.write_request(replace(observation, images=images), context, self._seed)
        data = packing.encode(request)
        limit = self.hello.limits.get("max_message_bytes", float("inf"))
        if len(data) > limit:  # the server would hang up on it
            got = f"{len(data)} bytes"
            raise ObservationError(explain("observation", f"at most {limit:.0f} bytes", got, "Send smaller images."))
        with self._turn:
            began = time.monotonic()
            reply = self._exchange(data, began + self._timeout_s)
            spent_ms = (time.monotonic() - began) * 1e3
        if isinstance(reply, str):
            raise protocol.read_error(reply)
        result, timing = protocol.read_answer(packing.decode(reply), self.hello, self.address)
        times = {**result.report.times_ms, "wait": timing.get("wait_ms", 0.0), "round_trip": spent_ms}
        return replace(result, report=replace(result.report, times_ms=times))

    def _exchange(self, data: bytes, deadline: float) -> str | bytes:
        """Send and receive; over a new connection when the old one broke, as it does when the server was restarted."""
        for fresh in (False, True):
            if self._connection is None:
                self._connection, hello = self._connect(deadline)
                self._require_same(hello)
                fresh = True
            try:
                _send(self._connection, data, deadline)
                return self._connection.recv(timeout=max(0.0, deadline - time.monotonic()))
            except (TimeoutError, ConnectionClosed) as error:
                late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
                self._drop()
                if late:
                    remedy = "Look at the server; a slower policy needs a larger timeout_s."
                    wanted = f"an answer within {self._timeout_s:g} s"
                    raise TransportError(explain(self.address, wanted, "none", remedy)) from None
                if fresh:
                    remedy = "Look at the server's output."
                    raise TransportError(explain(self.address, "an answer", str(error), remedy)) from error
        raise AssertionError

    def _connect(self, deadline: float) -> tuple[ClientConnection, Hello]:
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else {}
        left_s = max(0.01, deadline - time.monotonic())
        try:
            # Entered and never left: that is how all versions of the library from 15 on are told to connect at once.
            connection = connect(
                self.address, additional_headers=headers, compression=None, max_size=_MAX_ANSWER_BYTES, ssl=self._tls,
                proxy=None,  # never hand camera pictures to a proxy that some variable names
                open_timeout=left_s, close_timeout=1.0,
            ).__enter__()  # fmt: skip
        except InvalidStatus as error:
            raise self._refused(error.response.status_code) from error
        except ssl.SSLCertVerificationError as error:
            remedy = "Name who signed it: authority=FILE, or SSL_CERT_FILE in the environment."
            raise TransportError(explain(self.address, "a trusted certificate", str(error), remedy)) from error
        except InvalidURI as error:
            raise ConfigError(explain("address", "ws://HOST:PORT", str(error), "Correct it.")) from error
        except (OSError, WebSocketException) as error:
            remedy = "Start it with `vla serve`, and check host, port and ws or wss."
            raise _NotThere(explain(self.address, "a policy server", str(error) or "silence", remedy)) from error
        try:
            first = connection.recv(timeout=max(0.0, deadline - time.monotonic()))
            return connection, Hello.read(packing.decode(first) if isinstance(first, bytes) else first, self.address)
        except (TimeoutError, ConnectionClosed) as error:
            connection.close()
            got = str(error) or "silence"
            raise TransportError(explain(self.address, "a hello", got, "Is this a vla-stack server?")) from error
        except BaseException:
            connection.close()
            raise

    def _refused(self, status: int) -> TransportError:
        got, remedy = f"HTTP status {status}", "Is this a vla-stack server?"
        if status == 401:
            got, remedy = "a wrong token, or none", f"Give the server's token: token=..., or {TOKEN_VARIABLE}."
        elif status == 503:
            got, remedy = "too many clients", "Close some, or raise the server's max_connections."
        return TransportError(explain(self.address, "to be let in", got, remedy))

    def _require_same(self, hello: Hello) -> None:
        """Raise unless the server that came back is the one that was left."""
        if _what(hello) != _what(self.hello):
            self._drop()
            self.hello.embodiment.require_same(hello.embodiment, f"the policy at {self.address} before and now")
            got = f"another one ({hello.policy} {hello.fingerprint[:12]})"
            raise TransportError(explain(self.address, "the policy it served before", got, "Connect anew."))

    def _drop(self) -> None:
        """Without a farewell that a hung server would leave unanswered."""
        if self._connection is not None:
            _cut(self._connection)
            self._connection.close()
            self._connection = None


def _send(connection: ClientConnection, data: bytes, deadline: float) -> None:
    """The library's send has no time limit: a server that stopped reading would hold it for ever."""
    guard = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [connection])
    guard.start()
    try:
        connection.send(data)
    finally:
        guard.cancel()


def _cut(connection: ClientConnection) -> None:
    with contextlib.suppress(OSError):
        connection.socket.shutdown(socket.SHUT_RDWR)


class _NotThere(TransportError):
    """Nobody listens, so far."""


def _what(hello: Hello) -> tuple[Embodiment, int, str, Mapping[str, Any]]:
    return hello.embodiment, hello.horizon, hello.fingerprint, dict(hello.parts)


def _tls(authority: str | Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if authority is None else str(authority))
    except (OSError, ssl.SSLError) as error:
        got = f"{authority}: {error}"
        raise ConfigError(explain("authority", "a PEM file with certificates", got, "Check the file.")) from error
