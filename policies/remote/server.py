"""A policy behind a websocket: many robots, one model. Knows no weights: it is given a `Policy`.

It listens on loopback unless told otherwise, and elsewhere only with a token. One client is one task of one event loop;
the model runs on a thread of its own. Nothing waits for a client for ever: the handshake, pings and the closing each
have their time, a message its size, and a client has one request at a time. GET /healthz answers OK to anyone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import ipaddress
import logging
import math
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from policies.hold import ScriptedPolicy
from policies.remote import packing, protocol
from policies.remote.batching import Batcher
from policies.robot_memory import RememberingPolicy
from vla.errors import ConfigError, TransportError, VlaError, explain
from vla.policy import Policy, PolicyWrapper

_log = logging.getLogger(__name__)
# The library reports each handshake that fails with a traceback; who scans a port shall not fill a disk.
_library_log = logging.getLogger(f"{__name__}.websockets")
_library_log.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Limits:
    """What a client may take. max_connections: that finished their handshake. batch_wait_s: see Batcher. handshake_s:
    from connecting to the end of the handshake, TLS included. ping_s, pong_s: a client that leaves a ping without an
    answer for pong_s is dropped, also one that sends slower than that. close_s: for the closing handshake.
    """

    max_message_bytes: int = 16 * 2**20
    max_connections: int = 200
    max_batch: int = 8
    batch_wait_s: float = 0.002
    handshake_s: float = 10.0
    ping_s: float = 20.0
    pong_s: float = 20.0
    close_s: float = 2.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0.0 if name == "batch_wait_s" else 1e-3 if name.endswith("_s") else 1
            if not least <= value < math.inf:
                expected = f"a number of at least {least:g}"
                raise ConfigError(explain(name, expected, value, "Leave it out for the default."))


class PolicyServer:
    """`policy` must keep nothing between calls: its robots take turns in it. Reuse and ensembling remember, so they are
    around the RemotePolicy of each robot (see policies.remote.attach).

    host, port: where to listen, port 0 for a free one. token: what clients must show, "" for nothing. open_to_all:
    allow a host beyond loopback without a token. certificate, key: PEM files, for TLS. name, fingerprint, parts,
    software: for the hello. Raises ConfigError for what would be unsafe or cannot work.
    """

    def __init__(
        self,
        policy: Policy,
        host: str = "127.0.0.1",
        port: int = protocol.DEFAULT_PORT,
        *,
        token: str = "",
        open_to_all: bool = False,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        limits: Limits | None = None,
        name: str = "",
        fingerprint: str = "",
        parts: Mapping[str, Any] | None = None,
        software: str = "",
    ):
        check_access(host, port, token, open_to_all)
        _check_memory(policy)
        self._host, self._port, self._token = host, port, token
        self._tls = _tls(certificate, key)
        self._policy, self.limits = policy, limits or Limits()
        told = {
            "max_message_bytes": self.limits.max_message_bytes, "max_batch": self.limits.max_batch,
            "batch_wait_ms": self.limits.batch_wait_s * 1e3,
        }  # fmt: skip
        self.hello = protocol.Hello(policy.embodiment, policy.horizon, name, fingerprint, parts or {}, told, software)
        self._first = packing.encode(self.hello.to_dict())
        self.addresses: tuple[str, ...] = ()

    async def serve(self, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Until `stop`. on_ready: called when `addresses` are known and clients may come.

        Raises TransportError when the port is taken or the host is not this machine's.
        """
        limits = self.limits
        listening: list[Server] = []
        batcher = Batcher(self._policy, limits.max_batch, limits.batch_wait_s, lambda: len(listening[0].connections))
        try:
            server = await serve(
                lambda connection: self._talk(connection, batcher), self._host, self._port,
                origins=[None],  # a page in a browser names its origin: none may drive a robot
                process_request=self._admit, compression=None, server_header=None, logger=_library_log,
                open_timeout=limits.handshake_s, ping_interval=limits.ping_s, ping_timeout=limits.pong_s,
                close_timeout=limits.close_s, max_size=limits.max_message_bytes, max_queue=2, ssl=self._tls,
            )  # fmt: skip
        except OSError as error:
            where = f"{self._host}:{self._port}"
            raise TransportError(explain("policy server", where, str(error), "Choose another host or port.")) from error
        listening.append(server)
        scheme = "wss" if self._tls else "ws"
        self.addresses = tuple(f"{scheme}://{_show(sock)}" for sock in server.sockets)
        running = asyncio.ensure_future(batcher.run())
        stopped = asyncio.ensure_future(stop.wait())
        try:
            on_ready()
            await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            stopped.cancel()
            running.cancel()
            server.close()
            # A client in the middle of its handshake would keep this waiting; the loop ends it with all other tasks.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(server.wait_closed(), limits.close_s)

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """On this thread, until SIGINT or SIGTERM; a second one ends it the hard way."""

        async def main() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()

            def end() -> None:
                stop.set()
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)

            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, end)
            await self.serve(stop, on_ready)

        asyncio.run(main())

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """On a thread of this process while the context lasts; gives the address."""
        ready = threading.Event()
        failure: list[BaseException] = []
        ends: list[Callable[[], object]] = []

        async def until_told() -> None:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            ends.append(lambda: loop.call_soon_threadsafe(stop.set))
            await self.serve(stop, ready.set)

        def main() -> None:
            try:
                asyncio.run(until_told())
            except BaseException as error:
                failure.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=main, name="policy server", daemon=True)
        thread.start()
        ready.wait()
        try:
            if not failure:
                yield self.addresses[0]
        finally:
            with contextlib.suppress(RuntimeError):  # its loop has ended by itself
                ends[0]()
            thread.join()
        if failure:
            raise failure[0]

    # ---- one client ----
    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """None to go on with the handshake, or what to answer instead."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        shown = request.headers.get_all("Authorization")
        if self._token and not (len(shown) == 1 and _same(shown[0], f"Api-Key {self._token}")):
            _log.warning("%s: refused, %s token", _peer(connection), "wrong" if shown else "no")
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong token, or none\n")
        if len(connection.server.connections) >= self.limits.max_connections:
            _log.warning("%s: refused, %d clients are connected", _peer(connection), self.limits.max_connections)
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def _talk(self, connection: ServerConnection, batcher: Batcher) -> None:
        _log.info("%s: connected", _peer(connection))
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            await connection.send(self._first)
            last_ms: float | None = None
            async for data in connection:
                arrived = time.perf_counter()
                answer = asyncio.ensure_future(self._answer(data, last_ms, batcher))
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    answer.cancel()
                    break
                await connection.send(answer.result())
                last_ms = (time.perf_counter() - arrived) * 1e3
        except ConnectionClosed:
            pass
        finally:
            gone.cancel()
            _log.info("%s: gone", _peer(connection))

    async def _answer(self, data: str | bytes, last_ms: float | None, batcher: Batcher) -> str | bytes:
        """The message for one request; text when there was something wrong with it."""
        try:
            if isinstance(data, str):
                raise TransportError(explain("message", "a binary frame", "text", "Send msgpack."))
            observation, context = protocol.read_request(packing.decode(data), self._policy.embodiment)
            answer = await batcher.ask(observation, context)
            timing = {"wait_ms": answer.wait_ms, "infer_ms": answer.infer_ms, "batch": answer.batch}
            if last_ms is not None:
                timing["prev_total_ms"] = last_ms
            return packing.encode(protocol.write_answer(answer.result, timing))
        except VlaError as error:
            return protocol.write_error(error)
        except Exception as error:
            _log.exception("the policy failed")
            return f"the policy failed: {type(error).__name__}: {error}"


def check_access(host: str, port: int, token: str, open_to_all: bool) -> None:
    """Raise ConfigError for a port that is none, for an unusable token, and for a host beyond loopback without one,
    unless open_to_all."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(explain("port", "0 (a free one) to 65535", port, "Choose another."))
    if not token and not open_to_all and not is_loopback(host):
        remedy = "Give a token, or say (--no-token) that anyone who reaches the port may use the policy."
        raise ConfigError(explain("host", "a loopback address, or a token", f"{host!r} without one", remedy))
    if not all(33 <= ord(letter) <= 126 for letter in token):
        raise ConfigError(explain("token", "printable ASCII without spaces", "something else", "Choose another."))


def _check_memory(policy: Policy) -> None:
    """ConfigError for a policy that would take one robot's past for another's."""
    inner: Policy | None = policy
    while inner is not None:
        if isinstance(inner, (RememberingPolicy, ScriptedPolicy)):
            remedy = "Put it around the RemotePolicy of each robot."
            raise ConfigError(explain("policy", "one that keeps nothing between calls", type(inner).__name__, remedy))
        inner = inner.policy if isinstance(inner, PolicyWrapper) else None


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a socket that is bound to `host`; names count by what they stand for."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _tls(certificate: str | Path | None, key: str | Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError(explain("TLS", "a certificate and its key", "one of them", "Give both files."))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            explain("TLS", "a certificate and its key, as PEM", f"{error}", "Check both files.")
        ) from error
    return context


def _same(shown: str, wanted: str) -> bool:
    return hmac.compare_digest(shown.encode(errors="surrogateescape"), wanted.encode())


def _show(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _peer(connection: ServerConnection) -> str:
    where = connection.remote_address
    return f"{where[0]}:{where[1]}" if isinstance(where, tuple) else "a client"
