"""Server and client over real sockets: the same chunks as in process, for everyone who may ask, whatever others do."""

from __future__ import annotations

import http.client
import logging
import random
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from policies.remote import packing, protocol
from policies.remote.client import RemotePolicy
from policies.remote.server import Limits, PolicyServer, check_access, is_loopback
from policies.vla_policy import VlaPolicy
from tests.decoding.test_continuous import DECODERS, HEADS, bundle_of
from tests.remote.robots import QUICK, ROBOT, Echo, context, observation, opened, port_of, served, upgrade
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Decoder
from vla.errors import ConfigError, EmbodimentMismatch, ObservationError, TransportError
from vla.models.heads import HeadConfig
from vla.policy import InferContext, Policy, infer
from vla.tokenizers.text import TextTokenizer

TOKENS = AutoregressiveDecoder(temperature=1.0, head="words")


def learned(decoder: Decoder) -> VlaPolicy:
    """A random model with a head of every kind."""
    words = TextTokenizer.fit(["push"], max_length=5).vocab_size
    return VlaPolicy(bundle_of(heads=(*HEADS, HeadConfig("words", "tokens", 1, 9)), text_vocab=words), decoder)


def requests(policy: Policy, count: int) -> list[tuple[object, InferContext]]:
    """With and without a context, all different."""
    robot = policy.embodiment
    out = []
    for i in range(count):
        asked = context(i, robot, episode_seed=None) if i % 2 else InferContext(seed=i)
        out.append((observation(i, robot), asked))
    return out


# ---- the same chunks ----
@pytest.mark.parametrize("name", ["flow", "diffusion", "ensemble", "words"])
def test_the_same_seed_gives_the_same_chunk_bit_for_bit(name: str) -> None:
    policy = learned(TOKENS if name == "words" else DECODERS[name])
    with served(policy) as remote:
        assert isinstance(remote, Policy) and remote.horizon == policy.horizon
        assert remote.embodiment == policy.embodiment
        seen = []
        for episode in (3, 4):
            remote.reset(episode)
            for given, asked in requests(policy, 4):
                policy.reset(99)  # of somebody else in this process: a remote robot's seed is its own
                there = infer(remote, given, asked)
                policy.reset(episode)
                here = infer(policy, given, asked)
                assert there.chunk.actions.tobytes() == here.chunk.actions.tobytes()
                assert (there.chunk.start_ns, there.chunk.period_s) == (here.chunk.start_ns, here.chunk.period_s)
                times = {"preprocess", "prefix", "decode", "total", "wait", "round_trip"}
                assert set(there.report.times_ms) == times
                assert replace(there.report, times_ms={}) == replace(here.report, times_ms={})
                seen.append(there.chunk.actions.tobytes())
        assert len(set(seen)) == len(seen)  # observation, seed and episode matter


@pytest.mark.parametrize(("name", "tolerance"), [("flow", 1e-5), ("ensemble", 1e-5), ("words", 0.0)])
def test_batched_with_others_it_is_the_same_within_rounding(name: str, tolerance: float) -> None:
    policy = learned(TOKENS if name == "words" else DECODERS[name])
    asked = requests(policy, 12)
    alone = [infer(policy, *item).chunk.actions for item in asked]
    batches = []
    inner = policy.infer_batch
    policy.infer_batch = lambda o, c: (batches.append(len(o)), inner(o, c))[1]  # type: ignore[method-assign]
    with PolicyServer(policy, port=0, limits=replace(QUICK, max_batch=4, batch_wait_s=1.0)).running() as address:

        def robot(number: int) -> list[np.ndarray]:
            with RemotePolicy(address, policy.embodiment) as remote:
                ready.wait()
                return [infer(remote, *item).chunk.actions for item in asked[number::4]]

        ready = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(robot, range(4)))
    assert max(batches) == 4
    for number, mine in enumerate(alone):
        np.testing.assert_allclose(found[number % 4][number // 4], mine, atol=tolerance, rtol=0)


def test_several_observations_of_one_client_are_each_as_if_alone() -> None:
    policy = learned(DECODERS["flow"])
    asked = requests(policy, 3)
    with served(policy) as remote:
        together = remote.infer_batch([o for o, _ in asked], [c for _, c in asked])
    for result, item in zip(together, asked):
        assert np.array_equal(result.chunk.actions, infer(policy, *item).chunk.actions)


def test_the_policy_sees_what_the_robot_sent() -> None:
    policy = Echo()
    with served(policy) as remote:
        given = observation(5)
        remote.reset(6)
        infer(remote, replace(given, images={**given.images, "not a camera": given.images["wrist"]}), context(5))
    (seen, asked) = policy.given[-1]
    assert set(seen.images) == set(ROBOT.camera_names) and asked.episode_seed == 15
    assert all(np.array_equal(seen.images[name], given.images[name]) for name in seen.images)


# ---- errors ----
def test_a_mistake_is_told_to_who_made_it_and_the_connection_lives_on() -> None:
    with served(learned(DECODERS["flow"])) as remote:
        robot = remote.embodiment
        good = observation(1, robot)
        first = infer(remote, good).chunk.actions
        for changes, message in (
            ({"instruction": " "}, "instruction"),
            ({"state": np.full(3, np.nan, np.float32)}, "state: expected finite"),
            ({"state": np.zeros(4, np.float32)}, "state"),
            ({"images": {"front": good.images["front"]}}, "camera 'wrist'"),
            ({"images": {**good.images, "wrist": np.zeros((8, 8, 3), np.uint8)}}, r"expected uint8\[16, 16, 3\]"),
            ({"images": {**good.images, "wrist": np.zeros((16, 16, 3), np.float32)}}, "float32"),
        ):
            with pytest.raises(ObservationError, match=message):
                infer(remote, replace(good, **changes))
            assert np.array_equal(infer(remote, good).chunk.actions, first)


def test_a_policy_that_fails_fails_for_one_request(caplog: pytest.LogCaptureFixture) -> None:
    with served(Echo()) as remote, caplog.at_level(logging.ERROR):
        with pytest.raises(TransportError, match="the policy failed: RuntimeError: this one breaks me"):
            infer(remote, observation(state=np.full(7, 9.0, np.float32)))
        assert "this one breaks me" in caplog.text
        infer(remote, observation())


def test_raw_nonsense_is_answered_with_text() -> None:
    with served(Echo()) as remote, connect(remote.address, compression=None) as raw:
        raw.recv()
        for data in ("text", b"", b"\x00", b"\xdf\xff\xff\xff\xff", packing.encode({}), packing.encode([1])):
            raw.send(data)
            assert isinstance(raw.recv(timeout=5), str)
        raw.send(packing.encode(protocol.write_request(observation(), InferContext())))
        assert isinstance(raw.recv(timeout=5), bytes)


def test_a_message_that_is_too_large_ends_its_connection_only() -> None:
    with served(Echo(), replace(QUICK, max_message_bytes=200_000)) as remote:
        large = {name: np.zeros((512, 512, 3), np.uint8) for name in ROBOT.camera_names}
        with pytest.raises(ObservationError, match="at most 200000 bytes"):
            infer(remote, observation(images=large))
        with connect(remote.address, compression=None) as raw:
            raw.recv()
            raw.send(b"\0" * 300_000)
            with pytest.raises(Exception, match="1009"):
                raw.recv(timeout=5)
        infer(remote, observation())


# ---- who may connect ----
def test_a_wrong_token_is_refused_and_nothing_else_works_without() -> None:
    with PolicyServer(Echo(), port=0, limits=QUICK, token="s3cret").running() as address:
        for token in ("", "wrong", "s3cre", "s3crets", "S3CRET"):
            with pytest.raises(TransportError, match="wrong token, or none"):
                RemotePolicy(address, token=token)
        for head in ("Authorization: Bearer s3cret", "Authorization: Api-Key s3cret\r\nAuthorization: Api-Key x"):
            with opened(address, upgrade(address, head)) as sock:
                assert b"401" in sock.recv(100)
        with opened(address, upgrade(address, "Authorization: Api-Key \xff").replace(b"\xc3\xbf", b"\xff")) as sock:
            assert b" 401 " in sock.recv(100) or b" 400 " in sock.recv(100)
        with RemotePolicy(address, token="s3cret") as remote:
            infer(remote, observation())


def test_the_client_takes_its_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with PolicyServer(Echo(), port=0, limits=QUICK, token="s3cret").running() as address:
        monkeypatch.setenv("VLA_POLICY_TOKEN", "s3cret")
        RemotePolicy(address).close()


def test_only_loopback_without_a_token() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert is_loopback(host)
        check_access(host, 8000, "", False)
    for host in ("0.0.0.0", "::", "", "192.0.2.1", "no.such.host.invalid"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="host: expected a loopback address, or a token"):
            PolicyServer(Echo(), host)
        check_access(host, 8000, "token", False)
        check_access(host, 8000, "", True)
    with pytest.raises(ConfigError, match="token"):
        check_access("127.0.0.1", 8000, "with space", False)


def test_a_web_page_is_refused() -> None:
    with served(Echo()) as remote:
        with opened(remote.address, upgrade(remote.address, "Origin: http://example.org")) as sock:
            assert b"403" in sock.recv(100)
        with opened(remote.address, upgrade(remote.address)) as sock:
            assert b"101" in sock.recv(100)


def test_healthz_answers_anyone() -> None:
    with PolicyServer(Echo(), port=0, limits=QUICK, token="s3cret").running() as address:
        asked = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=5)
        asked.request("GET", "/healthz")
        answer = asked.getresponse()
        assert (answer.status, answer.read()) == (200, b"OK\n")
        asked.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    words = ["-subj", "/CN=robot", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes", "-batch"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *words]
    try:
        made = subprocess.run([*command, "-out", files[0], "-keyout", files[1]], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with: apt-get install openssl")
    assert made.returncode == 0, made.stderr
    return files


def test_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate
    with PolicyServer(Echo(), port=0, limits=QUICK, certificate=cert, key=key, token="t").running() as address:
        assert address.startswith("wss://127.0.0.1:")
        with RemotePolicy(address, authority=cert, token="t") as remote:
            assert len(infer(remote, observation()).chunk) == 8
            silent = opened(address)  # no TLS handshake: dropped in time, and in nobody's way
            infer(remote, observation())
            assert silent.recv(1) == b""
        with pytest.raises(TransportError, match="a trusted certificate"):
            RemotePolicy(address, token="t")
        with pytest.raises(TransportError, match="a policy server"):
            RemotePolicy(address.replace("wss", "ws"), timeout_s=3)
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        RemotePolicy(address, token="t").close()
    with pytest.raises(ConfigError, match="both files"):
        PolicyServer(Echo(), certificate=cert)
    with pytest.raises(ConfigError, match="PEM"):
        PolicyServer(Echo(), certificate=key, key=cert)
    with pytest.raises(ConfigError, match="authority"):
        RemotePolicy(address, authority=key)


def test_a_policy_for_another_robot_is_refused() -> None:
    with served(Echo()) as remote, pytest.raises(EmbodimentMismatch, match=r"rate_hz: 10\.0 != 20"):
        RemotePolicy(remote.address, replace(ROBOT, rate_hz=10.0))


# ---- clients that misbehave ----
def test_a_hundred_slow_and_half_open_clients_are_in_nobodys_way() -> None:
    frame = Frame(Opcode.BINARY, packing.encode(protocol.write_request(observation(), InferContext())))
    whole = frame.serialize(mask=True, extensions=[])
    with served(Echo(), replace(QUICK, batch_wait_s=0.0)) as remote:
        begin = upgrade(remote.address)
        kinds = (b"", b"GET", begin[:40], begin, begin + whole[:5], begin + whole[:9_000], begin + whole * 3)
        slow = [opened(remote.address, kinds[i % len(kinds)]) for i in range(100)]
        spent = []
        for i in range(30):
            began = time.monotonic()
            given = observation(i)
            actions = infer(remote, given).chunk.actions
            assert actions[0, 0] == pytest.approx(given.images["agentview"].mean())
            spent.append(time.monotonic() - began)
        assert max(spent) < 3.0, spent
        began = time.monotonic()
        for sock in slow:  # each is dropped, and none takes longer than handshake, ping and closing together
            try:
                while sock.recv(2**16):
                    pass
            except ConnectionResetError:
                pass
            sock.close()
        assert time.monotonic() - began < 10.0
        infer(remote, observation())


def test_who_comes_when_all_places_are_taken_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with PolicyServer(Echo(), port=0, limits=replace(QUICK, max_connections=2)).running() as address:
        first, second = RemotePolicy(address), RemotePolicy(address)
        with pytest.raises(TransportError, match="too many clients"):
            RemotePolicy(address)
        first.close()
        RemotePolicy(address, wait_s=5.0).close()
        infer(second, observation())
        second.close()


def test_random_bytes_beside_a_robot_at_work() -> None:
    rng = random.Random(0)
    stop = threading.Event()
    problems: list[BaseException] = []

    def throw(address: str) -> None:
        try:
            while not stop.is_set():
                head = rng.choice([b"", upgrade(address), b"GET /healthz HTTP/1.1\r\n"])
                body = rng.randbytes(rng.randrange(1, 2_000))
                if rng.random() < 0.5:
                    body = Frame(Opcode.BINARY, body).serialize(mask=True, extensions=[])
                try:
                    with opened(address, head + body) as sock:
                        sock.settimeout(0.02)
                        sock.recv(100)
                except OSError:
                    pass
        except BaseException as error:
            problems.append(error)

    with served(Echo()) as remote:
        throwers = [threading.Thread(target=throw, args=[remote.address]) for _ in range(4)]
        for thread in throwers:
            thread.start()
        for i in range(30):
            given = observation(i)
            actions = infer(remote, given).chunk.actions
            assert actions[0, 0] == pytest.approx(given.images["agentview"].mean())
        stop.set()
        for thread in throwers:
            thread.join()
    assert not problems


# ---- servers that go, hang or change ----
def ask_at(port: int, remote: RemotePolicy, policy: Policy, fingerprint: str) -> np.ndarray:
    """Start a server where `remote` knew one, and ask it."""
    with PolicyServer(policy, port=port, limits=QUICK, fingerprint=fingerprint).running():
        return infer(remote, observation()).chunk.actions


def test_a_server_that_was_restarted_is_found_again() -> None:
    with PolicyServer(Echo(), port=0, limits=QUICK, fingerprint="a").running() as address:
        remote = RemotePolicy(address)
        first = infer(remote, observation()).chunk.actions
    for _ in range(2):  # over a connection that broke, and over none
        with pytest.raises(TransportError, match=r"a policy server.*vla serve"):
            infer(remote, observation())
    for _ in range(2):
        assert np.array_equal(ask_at(port_of(address), remote, Echo(), "a"), first)
    remote.close()


def test_another_policy_at_the_same_place_is_refused() -> None:
    with served(Echo(), fingerprint="a") as remote:
        port = port_of(remote.address)
    with pytest.raises(TransportError, match="the policy it served before"):
        ask_at(port, remote, Echo(), "b")
    with pytest.raises(EmbodimentMismatch, match="before and now"):
        ask_at(port, remote, Echo(replace(ROBOT, rate_hz=5.0)), "a")


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next() -> None:
    policy = Echo(delay_s=0.5)
    with served(policy) as other, RemotePolicy(other.address, timeout_s=0.25) as remote:
        with pytest.raises(TransportError, match=r"an answer within 0\.25 s"):
            infer(remote, observation(1))
        policy.delay_s, remote._timeout_s = 0.0, 20.0
        time.sleep(0.4)
        given = observation(2)
        assert infer(remote, given).chunk.actions[0, 0] == pytest.approx(given.images["agentview"].mean())


def test_a_port_that_is_taken_and_an_address_that_is_none() -> None:
    with served(Echo()) as remote:
        again = PolicyServer(Echo(), port=port_of(remote.address))
        with pytest.raises(TransportError, match="policy server: expected 127"), again.running():
            pass
    with pytest.raises(ConfigError, match="ws://HOST:PORT"):
        RemotePolicy("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="ws://HOST:PORT"):
        RemotePolicy("ws://")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = time.monotonic()
        with pytest.raises(TransportError, match="a policy server"):
            RemotePolicy(f"ws://127.0.0.1:{deaf.getsockname()[1]}", timeout_s=0.3)
        assert time.monotonic() - began < 3.0


@pytest.mark.parametrize("name", ["max_message_bytes", "max_connections", "max_batch", "handshake_s", "ping_s"])
def test_limits_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: 0})
