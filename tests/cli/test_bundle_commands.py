"""info, doctor, eval and demo on a real, if untrained, bundle; train from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vla.cli import doctor, main


@pytest.fixture
def shipped(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle as if it were shipped under the name "tiny"."""
    shutil.copytree(tiny_bundle, tmp_path / "shipped" / "tiny")
    monkeypatch.setattr("vla.resources.pretrained_dir", lambda: tmp_path / "shipped")
    return tmp_path / "shipped" / "tiny"


def test_info_by_name_and_by_path(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("tiny", str(shipped)):
        assert main.main(["info", word, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["robot"] == "tabletop" and facts["rate_hz"] == 20.0 and facts["parameters"] > 1000
        assert facts["hash"] == json.loads((shipped / "bundle.json").read_text())["hashes"]["content"]
    assert main.main(["info", "tiny"]) == 0
    assert "tabletop" in capsys.readouterr().out


def test_info_offers_the_nearest_name(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["info", "tinny"]) == 2
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


def test_cut_bundle_is_refused_by_info_and_reported_by_doctor(
    shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = shipped / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main.main(["info", "tiny"]) == 2
    assert "sha256" in capsys.readouterr().err
    (check,) = doctor.examine(["bundles"])
    assert check.state == doctor.BROKEN and check.required and "sha256" in check.detail


def test_doctor_finds_a_whole_bundle(shipped: Path) -> None:
    (check,) = doctor.examine(["bundles"])
    assert (check.name, check.state) == ("bundle tiny", doctor.FOUND)


def test_eval_of_a_bundle(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", f"policy={tiny_bundle}", "episodes=1", f"out={tmp_path / 'eval'}", "--json"]
    assert main.main(words) == 0
    report = json.loads(capsys.readouterr().out)["none"]
    assert report["success"]["trials"] == 1 and report["episodes"][0]["seed"] == 1_000_000


def test_demo_of_a_bundle_measures_inference(tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["demo", "--policy", str(tiny_bundle), "--episodes", "1", "--task", "push", "--min-success", "0"]
    assert main.main([*words, "--no-film", "--out", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["inference_ms"]["p50"] > 0
    assert summary["bundle_hash"] == json.loads((tiny_bundle / "bundle.json").read_text())["hashes"]["content"]
    assert summary["due_actions"] > 50 and summary["episodes"] == 1


def test_train_refuses_a_data_set_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", f"data={tmp_path}", f"out={tmp_path / 'run'}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
