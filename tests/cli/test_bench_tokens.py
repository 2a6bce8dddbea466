"""`vla bench tokens`: chunks are cut right, errors and ratios mean what they say, a real run prints every row."""

import json
from pathlib import Path

import numpy as np
import pytest

from vla.cli import bench_tokens
from vla.cli.main import main
from vla.errors import DataError

FAST_PLUS = Path(__file__).parents[1] / "fixtures" / "fast_plus"


def arm(seed: int = 0) -> bench_tokens.Arm:
    """Slow sines in metres, one rotation that never moves, a gripper that switches once."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(40):
        time = np.arange(60) / 20.0
        move = [0.02 * np.sin(time * rng.uniform(0.5, 2.0) + rng.uniform(0, 6)) for _ in range(3)]
        gripper = np.where(time < rng.uniform(0.5, 2.5), 1.0, -1.0)
        episodes.append(np.stack([*move, np.zeros(60), gripper], axis=1).astype(np.float32))
    metres = np.array([True, True, True, False, False])
    gripper_mask = np.array([False, False, False, False, True])
    return bench_tokens.Arm(episodes[:30], episodes[30:], metres, gripper_mask, attempts=40, seconds=3.0)


def test_chunks_are_whole_and_apart():
    episode = np.arange(47, dtype=np.float32)[:, None]
    assert [chunk[0, 0] for chunk in bench_tokens.cut([episode], 20, 20)[0]] == [0, 20]
    assert [chunk[-1, 0] for chunk in bench_tokens.cut([episode], 20, 9)[0]] == [19, 28, 37, 46]


def test_two_arms_are_two_scenes():
    chunks = [[np.full((2, 1), 10 * i + j) for j in range(3 - i)] for i in range(2)]
    pairs = bench_tokens.side_by_side(chunks, 2)
    assert [pair[0].tolist() for pair in pairs] == [[0, 10], [1, 11], [10, 0], [11, 1]]
    triple = [[np.full((2, 1), float(i))] for i in range(3)]
    assert len(bench_tokens.side_by_side(triple, 2, partners=2)) == 6


@pytest.mark.parametrize("arms", [1, 2])
def test_rows_hold_what_they_claim(arms):
    rows = {row.tokenizer: row for row in bench_tokens.measure(20, arms, arm(), None, vocab_size=1024, scale=10)}
    assert set(rows) == {"bins", "FAST fitted"}
    bins, fast = rows["bins"], rows["FAST fitted"]
    assert bins.tokens == 20 * 5 * arms
    assert bins.ratio == 1.0
    assert bins.nonzero is None
    assert fast.ratio == pytest.approx(bins.tokens / fast.tokens)
    assert fast.ratio > 3
    # 0.5 / scale bounds the RMS of rounding; a range of +-0.02 m turns it into at most 1 mm
    assert 0 < fast.rms <= 0.05
    assert 0 < fast.rms_mm <= 1.0
    assert 0 < fast.nonzero_gripper < fast.nonzero


def test_finer_scale_costs_tokens_and_saves_error():
    coarse, fine = (bench_tokens.measure(20, 1, arm(), None, 1024, scale)[1] for scale in (5, 30))
    assert fine.tokens > coarse.tokens
    assert fine.rms_mm < coarse.rms_mm / 3


def test_real_run_prints_every_row(capsys, monkeypatch):
    monkeypatch.setenv(bench_tokens.FAST_PLUS_VARIABLE, str(FAST_PLUS))
    sizes = ["--fit-episodes", "2", "--test-episodes", "1", "--rates", "5", "20"]
    assert main(["bench", "tokens", "--json", *sizes]) == 0
    data = json.loads(capsys.readouterr().out)
    seen = [(row["rate_hz"], row["dims"], row["tokenizer"]) for row in data["rows"]]
    names = ("bins", "FAST+", "FAST fitted")
    assert seen == [(rate, dims, name) for rate in (5, 20) for dims in (7, 14) for name in names]
    assert all(row["tokens"] < row["rate_hz"] * row["dims"] for row in data["rows"] if row["tokenizer"] != "bins")


def test_absent_fast_plus_is_said_and_a_wrong_path_is_an_error(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(bench_tokens.FAST_PLUS_VARIABLE, raising=False)
    monkeypatch.setattr(bench_tokens, "collect", lambda *_: arm())
    assert main(["bench", "tokens", "--rates", "20"]) == 0
    out = capsys.readouterr().out
    assert "FAST+ was skipped" in out
    assert "| FAST fitted" in out
    assert main(["bench", "tokens", "--fast-plus", str(tmp_path)]) == 2
    assert "processor_config.json" in capsys.readouterr().err
    with pytest.raises(DataError):
        main(["bench", "tokens", "--fast-plus", str(tmp_path), "--debug"])


@pytest.mark.parametrize("option", [["--pace", "0"], ["--test-episodes", "0"], ["--rates", "-5"]])
def test_nonsense_is_refused(option, capsys):
    assert main(["bench", "tokens", *option]) == 2
    assert "expected" in capsys.readouterr().err
