"""Whole or not at all."""

from pathlib import Path

import pytest

from vla.errors import ConfigError
from vla.files import exclusive, replacing, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "deep" / "a.txt").read_text() == "old"
    assert names(tmp_path / "deep") == ["a.txt"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "set") as temporary:
        temporary.mkdir()
        (temporary / "x").write_text("1")
        assert names(tmp_path) == [temporary.name] and temporary.name.startswith(".")
    assert names(tmp_path) == ["set"]
    with pytest.raises(OSError), replacing(tmp_path / "set") as temporary:
        temporary.mkdir()
    assert (tmp_path / "set" / "x").read_text() == "1" and names(tmp_path) == ["set"]


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    again = exclusive(tmp_path, "out")
    with exclusive(tmp_path, "out"), pytest.raises(ConfigError, match=r"out: .*no other run"), again:
        pass
    with exclusive(tmp_path, "out"):
        pass
