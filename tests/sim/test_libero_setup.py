"""`vla setup libero` and finding the assets, without network and without LIBERO."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from sim.libero import assets, setup
from vla.errors import SimulationError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete assets folder that nothing names yet, and a user without settings."""
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    complete = tmp_path / "libero_assets"
    for name in assets.ASSET_FOLDERS:
        (complete / name).mkdir(parents=True)
    return complete


class FakePip:
    """Records the pip calls and the pins they were given; everything else succeeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False):
        self.calls: list[list[str]] = []
        self.pins: list[str] = []
        self.fails = fails
        monkeypatch.setattr(setup.subprocess, "run", self)

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if "pip" in command:
            self.calls.append(command)
            if "-c" in command:
                self.pins += Path(command[command.index("-c") + 1]).read_text().splitlines()
            if self.fails:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")
        return subprocess.CompletedProcess(command, 0, "", "")


def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "_satisfied", lambda requirement: False)


def test_packages_are_installed_without_their_dependencies_and_nothing_else_moves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(monkeypatch)
    nothing_installed(monkeypatch)
    said: list[str] = []
    report = setup.setup_libero(folder, echo=said.append)
    plain, bare = pip.calls
    assert set(setup.WITH_DEPENDENCIES) <= set(plain) and "--no-deps" not in plain
    assert set(setup.WITHOUT_DEPENDENCIES) <= set(bare) and "--no-deps" in bare
    assert {pin.split("==")[0] for pin in pip.pins} >= {"numpy", "torch", "mujoco"}
    assert report.assets == folder and any(str(folder) in line for line in said)


def test_a_second_run_asks_pip_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    monkeypatch.setattr(setup, "_satisfied", lambda requirement: True)
    report = setup.setup_libero(folder, echo=lambda line: None)
    assert pip.calls == [] and report.installed == ()


def test_a_failing_pip_is_reported_with_its_last_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, fails=True)
    nothing_installed(monkeypatch)
    with pytest.raises(SimulationError, match=r"no network[\s\S]*Check the network"):
        setup.setup_libero(folder, echo=lambda line: None)


def test_installed_versions_are_compared() -> None:
    assert setup._satisfied("numpy>=1.26")
    assert not setup._satisfied("numpy>=99")
    assert not setup._satisfied("numpy==0.0.1")
    assert not setup._satisfied("no-such-package-of-that-name>=1")


def test_named_assets_are_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SimulationError, match=assets.ASSETS_VARIABLE):
        assets.resolve_assets()
    FakePip(monkeypatch)
    monkeypatch.setattr(setup, "_satisfied", lambda requirement: True)
    setup.setup_libero(folder, echo=lambda line: None)
    assert assets.resolve_assets() == folder


def test_a_wrong_folder_is_an_error_even_when_a_good_one_is_configured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup._remember(folder)
    monkeypatch.setenv(assets.ASSETS_VARIABLE, str(folder / "absent"))
    with pytest.raises(SimulationError, match="absent"):
        assets.resolve_assets()
    (folder / "scenes").rmdir()
    monkeypatch.setenv(assets.ASSETS_VARIABLE, str(folder))
    with pytest.raises(SimulationError, match=r"\['scenes'\] missing"):
        assets.resolve_assets()


def test_what_cannot_run_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_installed", lambda name: name != "bddl")
    assert "['bddl']" in assets.unavailable_reason() and "vla setup libero" in assets.unavailable_reason()
    with pytest.raises(SimulationError, match="vla setup libero"):
        assets.import_robosuite()
    monkeypatch.setattr(assets, "_installed", lambda name: True)
    assert assets.ASSETS_VARIABLE in assets.unavailable_reason()
    assert assets.unavailable_reason(assets=False) == ""
