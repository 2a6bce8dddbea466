"""Observations, contexts and answers as messages, and back."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from policies.remote import protocol
from policies.remote.packing import decode, encode
from policies.remote.protocol import Hello, read_answer, read_error, read_request, write_answer, write_error
from tests.remote.robots import HELLO, ROBOT, context, observation
from vla.errors import ConfigError, EmbodimentMismatch, ObservationError, TransportError
from vla.policy import DecodeReport, InferContext, InferResult
from vla.types import ActionChunk, Frame


def sent(message: object) -> object:
    return decode(encode(message))


def bare(**changes: object) -> dict[str, object]:
    """The least that a client sends."""
    seen = observation()
    message = {f"observation/images/{name}": image for name, image in seen.images.items()}
    return {**message, "observation/state": seen.state, "prompt": "push", **changes}


def test_an_observation_comes_back_with_its_whole_context() -> None:
    given, asked = observation(3), context(3)
    seen, back = read_request(sent(protocol.write_request(given, asked)), ROBOT)
    assert set(seen.images) == set(given.images)
    assert all(np.array_equal(seen.images[name], given.images[name]) for name in given.images)
    assert np.array_equal(seen.state, given.state) and seen.state.dtype == np.float32
    assert (seen.instruction, seen.stamp_ns, seen.history) == (given.instruction, given.stamp_ns, ())
    for item in fields(InferContext):  # a field that is added there has to travel too
        mine, theirs = getattr(asked, item.name), getattr(back, item.name)
        if item.name == "previous":
            assert np.array_equal(mine.actions, theirs.actions)
            assert (mine.start_ns, mine.period_s) == (theirs.start_ns, theirs.period_s)
        elif item.name == "committed":
            assert np.array_equal(mine, theirs)
        else:
            assert mine == theirs and mine != item.default, item.name


def test_what_is_left_out_is_the_default() -> None:
    seen, asked = read_request(sent(bare()), ROBOT)
    assert asked == InferContext() and seen.stamp_ns == 0
    again, _ = read_request(sent(protocol.write_request(seen, InferContext())), ROBOT)
    assert np.array_equal(again.state, seen.state)


def test_a_policy_that_was_reset_sends_its_seed_unless_the_context_has_one() -> None:
    asked = InferContext(seed=1)
    assert protocol.write_request(observation(), asked, 7)["episode_seed"] == 7
    assert protocol.write_request(observation(), replace(asked, episode_seed=8), 7)["episode_seed"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation/image/wrist": 1}, "unknown key.*Did you mean 'observation/images/wrist'"),
        ({"observation/images/top": np.zeros((2, 2, 3), np.uint8)}, "unknown key"),
        ({"observation/images/wrist": np.zeros((2, 2, 3), np.float32)}, r"wrist: expected uint8\[H, W, 3\].*float32"),
        ({"observation/images/wrist": np.zeros((2, 2, 3), np.uint16)}, "uint16"),
        ({"observation/images/wrist": np.zeros((3, 2, 2), np.uint8)}, r"got uint8\[3, 2, 2\]"),
        ({"observation/images/wrist": None}, "NoneType"),
        ({"observation/state": None}, "observation/state: expected a value, got nothing"),
        ({"observation/state": [1, "x"]}, r"state: expected float32\[N\], got list"),
        ({"observation/state": [True]}, "got list"),
        ({"observation/state": np.zeros((1, 7))}, "state"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt: expected text, got int"),
        ({"prompt": ["push"]}, "got list"),
        ({"seed": 1.0}, "seed: expected an integer"),
        ({"seed": True}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"executed": -1}, "executed"),
        ({"executed": 10**9}, "executed"),
        ({"committed": np.zeros((2, 3), np.float32)}, r"committed: expected float32\[N, 7\]"),
        ({"committed": np.full((2, 7), np.nan)}, "finite"),
        ({"committed": np.full((2, 7), 1e300)}, "finite"),
        ({"previous": np.zeros((2, 7))}, "previous"),
        ({"previous": {"actions": np.zeros((2, 7))}}, "previous: expected"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        read_request(sent(bare(**changes)), ROBOT)


@pytest.mark.parametrize(
    ("key", "value"),
    [("actions", np.zeros((0, 7))), ("actions", np.full((1, 7), np.inf)), ("period_s", 0.0), ("period_s", 1),
     ("period_s", float("nan")), ("start_ns", "now")],
)  # fmt: skip
def test_a_previous_chunk_that_was_none_is_refused(key: str, value: object) -> None:
    given = {"actions": np.zeros((2, 7)), "period_s": 0.05, "start_ns": 3}
    read_request(sent(bare(previous=given)), ROBOT)
    read_request(sent(bare(previous={**given, "ids": [1]})), ROBOT)  # clients of the first release send its tokens
    with pytest.raises(ObservationError, match=r"previous|start_ns"):
        read_request(sent(bare(previous={**given, key: value})), ROBOT)


@pytest.mark.parametrize("message", [None, 3, [], "text", np.zeros(3)])
def test_what_is_no_map_is_no_observation(message: object) -> None:
    with pytest.raises(ObservationError, match="a map"):
        read_request(sent(message), ROBOT)


def test_older_frames_are_refused_rather_than_left_out() -> None:
    seen = observation()
    with pytest.raises(ObservationError, match="history"):
        protocol.write_request(replace(seen, history=(Frame(seen.images, seen.state, 0),)), InferContext())


def result(actions: np.ndarray) -> InferResult:
    report = DecodeReport(
        (1, 2), 3, 1, np.float64(0.5), np.array([4, 5]), {"total": 2.0}, {"layers": np.float32(1.5)}, "still"
    )
    return InferResult(ActionChunk(actions, 5, 0.05), report)


def test_an_answer_comes_back_with_its_report() -> None:
    given = result(np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32))
    message = write_answer(given, {"infer_ms": 1.0})
    arrays = [key for key, value in message.items() if isinstance(value, np.ndarray)]
    assert arrays == ["actions"]  # openpi's ActionChunkBroker indexes all others by step too
    back, timing = read_answer(sent(message), HELLO, "here")
    assert np.array_equal(back.chunk.actions, given.chunk.actions) and timing == {"infer_ms": 1.0}
    assert (back.chunk.start_ns, back.chunk.period_s) == (5, 0.05)
    for item in fields(DecodeReport):
        mine, theirs = getattr(given.report, item.name), getattr(back.report, item.name)
        assert np.array_equal(mine, theirs) if item.name == "kept_tokens" else mine == theirs
    plain = InferResult(given.chunk)
    assert read_answer(sent(write_answer(plain, {})), HELLO, "here")[0].report == plain.report


@pytest.mark.parametrize(
    ("key", "value"),
    [("actions", np.zeros((9, 7))), ("actions", np.zeros((0, 7))), ("actions", np.full((2, 7), np.nan)),
     ("actions", np.zeros((2, 6))), ("report", None), ("start_ns", None), ("period_s", "x")],
)  # fmt: skip
def test_an_answer_that_is_not_the_robots_is_refused(key: str, value: object) -> None:
    message = write_answer(result(np.zeros((4, 7), np.float32)), {})
    message[key] = value
    if key == "start_ns":
        del message["report"]
    with pytest.raises(TransportError, match="here: expected an answer"):
        read_answer(sent(message), HELLO, "here")


def test_the_hello_carries_the_robot_and_says_what_to_send() -> None:
    hello = Hello(ROBOT, 16, "tabletop", "abc", {"decoder": {"_target_": "x"}}, {"max_batch": 8}, "vla-stack 1")
    message = sent(hello.to_dict())
    assert Hello.read(message, "here") == hello
    assert set(message["observation"]) == set(bare()) and "seed" in message["optional"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"version": 2}, "version 2"), ({"protocol": "x"}, "'x' version 1"), ({"protocol": None}, "another protocol"),
     ({"horizon": "many"}, "complete hello"), ({"embodiment": 3}, "complete hello"),
     ({"embodiment": {"name": "x"}}, "required keys")],
)  # fmt: skip
def test_a_foreign_hello_is_refused(changes: dict[str, object], error: str) -> None:
    with pytest.raises((TransportError, ConfigError), match=error):
        Hello.read(sent({**HELLO.to_dict(), **changes}), "here")
    for other in ({}, [], "hello", None):
        with pytest.raises(TransportError, match="another protocol"):
            Hello.read(other, "here")


def test_errors_keep_their_class_and_words() -> None:
    for error in (ObservationError("a: b"), EmbodimentMismatch("c"), TransportError("d")):
        back = read_error(write_error(error))
        assert type(back) is type(error) and str(back) == str(error)
    for text in ("KeyError: 'x'", "explain: x", "Traceback (most recent call last)", ""):
        assert type(read_error(text)) is TransportError
