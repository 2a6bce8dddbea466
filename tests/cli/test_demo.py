"""`vla demo` as a user runs it: processes, results, Ctrl-C. The expert drives, so that no trained bundle is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vla.cli import main
from vla.runtime.trace import Trace

COMMAND = (sys.executable, "-u", "-m", "vla.cli.main", "demo")


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    """With Ctrl-C as in a terminal: what a shell runs in the background inherits SIGINT ignored."""
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_interrupted_run_stops_its_processes_and_leaves_valid_results(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "report.html").write_text("of an earlier run")
    (out / "notes.txt").write_text("mine")
    process = start(out, "--policy", "expert", "--episodes", "50", "--task", "push")
    children: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        lines = [next(process.stdout)]
        while "/50" not in lines[-1]:
            lines.append(next(process.stdout))
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == main.EXIT_INTERRUPTED, rest
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    summary = json.loads((out / "summary.json").read_text())
    assert 1 <= summary["episodes"] < 50 and summary["successes"] >= 1
    assert summary["seeds"][0] == 1_000_000 and summary["bundle_hash"] is None
    assert sum(summary["gate"].values()) > 10 and summary["control_hz"] > 5
    assert summary["transport_ms"]["p50"] > 0 and summary["peak_rss_mb"] > 50
    details = json.loads((out / "run.json").read_text())
    assert details["interrupted"] and details["episodes"][0]["family"] == "push"
    assert "interrupted after" in (out / "report.html").read_text()
    trace = Trace.load_mcap(out / "trace.mcap")
    assert trace.rows > 10 and {image.camera for image in trace.images} == {"agentview", "wrist"}
    assert (out / "episodes.mp4").stat().st_size > 1000
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_policy_process_killed_in_motion_is_started_again_and_named(tmp_path: Path) -> None:
    process = start(tmp_path, "--policy", "hold", "--episodes", "2", "--no-film", "--min-success", "0", "--debug")
    try:
        deadline = time.monotonic() + 60
        policy = None
        while policy is None and time.monotonic() < deadline:
            time.sleep(0.5)
            for child in psutil.Process(process.pid).children():
                if "ros_nodes.policy_node" in child.cmdline() and (tmp_path / "logs").is_dir():
                    policy = child
        assert policy is not None
        time.sleep(12)  # the nodes find each other, the first episode moves
        os.kill(policy.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, output
    details = json.loads((tmp_path / "run.json").read_text())
    texts = [event["text"] for event in details["events"]]
    assert any("killed by signal 9, started again" in text for text in texts), texts
    assert any("heartbeat" in text for text in texts), texts
    assert len(details["episodes"]) == 2
    assert "started again" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--env", "tabletopp"), "Did you mean 'tabletop'?"),
        (("--policy", "no_such_bundle"), "no_such_bundle"),
        (("--env", "robosuite"), "no scripted expert for 'robosuite'"),
        (("--task", "stak", "--policy", "expert"), "Did you mean 'stack'?"),
        (("--pruning", "scor"), "Did you mean 'score'?"),
        (("--reuse", "flashvla"), "Choose pruning score"),
        (("--policy", "hold", "--ensembling", "act"), "ensembling: expected a bundle"),
    ],
)
def test_misspelt_names_are_one_message(
    words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["demo", "--out", str(tmp_path), *words]) == 2
    assert says in capsys.readouterr().err


def test_a_node_that_dies_keeps_what_was_measured(tmp_path: Path) -> None:
    process = start(tmp_path, "--policy", "expert", "--episodes", "50", "--task", "push", "--no-film")
    try:
        assert process.stdout is not None
        while "/50" not in next(process.stdout):
            pass
        (sim,) = (c for c in psutil.Process(process.pid).children() if "ros_nodes.sim_node" in c.cmdline())
        sim.kill()
        rest, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == main.EXIT_ERROR, rest
    assert "the sim node ended with code -9" in rest and "Traceback" not in rest
    assert json.loads((tmp_path / "summary.json").read_text())["episodes"] >= 1


def test_only_what_a_run_writes_is_removed_before_the_next(tmp_path: Path) -> None:
    from vla.cli.demo_run import clear

    ours = ("summary.json", "trace.mcap", "logs/sim.log", "stats/sim.json")
    theirs = ("notes.txt", "logs/mine.txt", "stats/deep/numbers.json")
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    clear(tmp_path)
    assert not any((tmp_path / name).exists() for name in ours) and all((tmp_path / name).exists() for name in theirs)


def test_the_first_seed_is_the_first_of_evaluation() -> None:
    from ros_nodes import evaluate
    from sim.environment import EVAL_SEED_START
    from vla.cli import demo

    assert demo.EVAL_SEED_START == evaluate.FIRST_SEED == EVAL_SEED_START


def test_episode_count_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["demo", "--episodes", "0"])
    assert ended.value.code == 2 and "at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.libero
def test_libero_scene_runs_through_the_same_graph(tmp_path: Path) -> None:
    from sim.libero.assets import unavailable_reason

    if reason := unavailable_reason():
        pytest.skip(reason)
    words = ("--env", "libero_object", "--task", "3", "--policy", "expert", "--episodes", "1")
    process = start(tmp_path, *words)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    details = json.loads((tmp_path / "run.json").read_text())
    assert 0 < details["real_time_factor"] <= 0.3
    assert "bbq sauce" in details["episodes"][0]["instruction"]
