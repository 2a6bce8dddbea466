"""What the policy core says of itself on /diagnostics, and of its chunks and cameras in the heartbeat."""

from __future__ import annotations

import numpy as np
import pytest

from ros_nodes import messages as m
from ros_nodes.node import CONTROL_STATUS, DIAGNOSTICS, HEARTBEAT
from tests.ros.test_policy_core import AGENT, PERIOD, T0, WRIST, Driver
from vla.policy import DecodeReport, InferResult
from vla.types import ActionChunk


def test_the_heartbeat_says_what_chunks_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver().ready()
    reports = iter([DecodeReport(passes=6), DecodeReport(reused="still"), DecodeReport(passes=4), DecodeReport()])
    chunk = ActionChunk(np.zeros((4, 7), np.float32), T0, 0.05)
    monkeypatch.setattr(driver.policy, "infer_batch", lambda o, c: [InferResult(chunk, next(reports))])
    assert not {"reuse", "passes_per_chunk", "first_action_ms_p50"} & set(driver.beat().values)
    for number, waited_ns in enumerate((0, 10_000_000, 20_000_000, 30_000_000)):
        driver.time_ns += PERIOD
        driver.ask(number=number, start_ns=driver.time_ns)  # waits for sensors
        driver.time_ns += waited_ns
        driver.sensors(driver.time_ns)
    values = driver.beat().values
    assert (values["chunks"], values["queue"], values["passes"], values["reused"]) == ("4", "0", "0", "")
    assert (values["passes_per_chunk"], values["reuse"]) == ("2.50", "0.250")
    assert float(values["first_action_ms_p50"]) == 15.0 and 29.0 < float(values["first_action_ms_p99"]) <= 30.0
    assert 0 <= float(values["latency_ms_p50"]) <= float(values["latency_ms_p99"])


def test_the_heartbeat_tells_how_often_pictures_come() -> None:
    driver = Driver().ready()
    for number in range(1, 9):
        driver.frame(AGENT, number * 33_333_333 + 40_000_000 * (number == 5))  # one is late
        driver.frame(WRIST, number * 50_000_000)
    told = driver.core.status(driver.now()).values
    assert abs(int(told["spacing_ns/agentview"]) - 33_333_333) < 10 and told["spacing_ns/wrist"] == "50000000"
    assert told["stamp_ns/wrist"] == str(T0 + 400_000_000)


def report(driver: Driver) -> m.Status:
    """What the policy says on /diagnostics, 5 times a second, and not more often."""
    driver.sent.clear()
    for _ in range(8):
        driver.time_ns += 50_000_000
        driver.perform(driver.core.tick(driver.now()))
    told = [sent.message for sent in driver.sent if sent.topic == DIAGNOSTICS.topic]
    assert len(told) == 2
    return told[-1].statuses[0]


def test_diagnostics_tell_of_the_policy_and_of_a_command_node_that_is_gone() -> None:
    driver = Driver()
    assert report(driver).level == m.WARN and "no instruction yet" in report(driver).message
    driver.ready()
    assert report(driver).level == m.OK, "nobody has to be there"
    driver.give(CONTROL_STATUS.topic, m.Text("whatever it says"))
    assert report(driver).level == m.OK
    for _ in range(2):
        said = report(driver)
    assert said.level == m.WARN and "no word of the command node on /vla/status for 1 s" in said.message
    driver.give(CONTROL_STATUS.topic, m.Text("back"))
    assert report(driver).level == m.OK


def test_diagnostics_tell_of_an_inference_that_hangs_while_the_heartbeat_is_silent() -> None:
    driver = Driver().ready()
    driver.run_jobs = False
    driver.ask()
    report(driver)
    said = report(driver)
    assert said.level == m.ERROR and "an inference has been running for 0.7 s" in said.message
    assert sum(sent.topic == HEARTBEAT.topic for sent in driver.sent) < 3, "silent from half a second on"
