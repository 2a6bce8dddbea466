"""What `vla doctor` says, found and missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vla.cli import doctor, main


def one(name: str) -> doctor.Check:
    (check,) = doctor.examine([name])
    return check


def test_python_and_torch_are_found_here() -> None:
    assert one("python").state == one("torch").state == doctor.FOUND


def test_gl_backend_that_cannot_render_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    check = one("gl")
    assert check.state == doctor.MISSING and "libosmesa6" in check.remedy and "nonsense" in check.detail


def test_gl_renders_here() -> None:
    assert one("gl").state == doctor.FOUND


def test_missing_bundles_are_named_and_the_base_stays_usable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vla.resources.pretrained_dir", lambda: tmp_path)
    assert main.main(["doctor", "--only", "bundles", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["usable"] is True
    assert out["checks"][0]["state"] == doctor.MISSING and "vla train" in out["checks"][0]["remedy"]


def test_missing_libero_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    check = one("libero")
    assert check.state == doctor.MISSING and not check.required and "vla setup libero" in check.remedy


def test_assets_folder_that_is_none_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLA_LIBERO_ASSETS", str(tmp_path))
    check = one("assets")
    assert check.state == doctor.MISSING and "stable_scanned_objects" in check.detail


def test_a_check_that_fails_is_reported_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> doctor.Check:
        raise RuntimeError("boom")

    monkeypatch.setitem(doctor.CHECKS, "torch", fails)
    broken, python = doctor.examine(["torch", "python"])
    assert broken.state == doctor.BROKEN and "boom" in broken.detail and broken.required
    assert python.state == doctor.FOUND


def test_other_versions_than_tested_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1")
    check = one("versions")
    assert check.state == doctor.BROKEN and "numpy 0.0.1" in check.detail and not check.required
