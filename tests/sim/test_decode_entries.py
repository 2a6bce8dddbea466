"""The lines of the decode benchmark: all decoders have one, references come along, the how-to does what it says."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from sim import decode_entries
from vla import configs
from vla.errors import ConfigError
from vla.resources import config_dir

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-decoder.md"
BY_NAME = {entry.name: entry for entry in decode_entries.ENTRIES}


def test_every_decoder_has_a_line_and_every_line_its_references() -> None:
    assert {entry.config for entry in decode_entries.ENTRIES} == set(configs.names("decoder"))
    assert len(BY_NAME) == len(decode_entries.ENTRIES)
    assert {name for entry in decode_entries.ENTRIES for name in entry.compared} <= set(BY_NAME)
    assert decode_entries.ENTRIES[0].compared == () and BY_NAME["greedy FAST"].compared == ("greedy bins",)


def test_chosen_lines_bring_what_they_are_compared_with_and_so_on() -> None:
    def names(*only: str) -> list[str]:
        return [entry.name for entry in decode_entries.chosen(only)]

    bins, fast = ["greedy bins", "greedy bins, again"], ["greedy FAST", "greedy FAST, again"]
    assert names() == list(BY_NAME)
    assert names("flow, 4 steps") == [*bins, "flow, 4 steps"]
    assert names("anytime FAST") == [*bins, *fast, "anytime FAST"]
    assert names("jacobi distilled") == [*bins, "greedy distilled", "jacobi distilled"]
    assert names("hybrid ensemble") == [*bins, "diffusion, 4 steps", "hybrid tokens", "hybrid ensemble"]
    with pytest.raises(ConfigError, match="Did you mean 'flow, 4 steps'"):
        decode_entries.chosen(["flow, 4 step"])


def test_decoders_without_a_line_are_measured_with_their_defaults() -> None:
    lines = decode_entries.by_default(["capped", "flow"])
    assert [(line.name, line.options, line.reference) for line in lines] == [
        ("capped bins", ("head=bins",), "greedy bins"), ("capped FAST", ("head=fast",), "greedy FAST"),
        ("flow", (), "greedy bins"),
    ]  # fmt: skip


def test_the_decoder_of_the_how_to_needs_its_two_files_only(tmp_path, monkeypatch) -> None:
    """The page's code and config, put where it says: the benchmark and the contract test find it."""
    text = PAGE.read_text()
    code, config = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "yaml"))
    (tmp_path / "eager.py").write_text(code)
    spec = importlib.util.spec_from_file_location("vla.decoding.eager", tmp_path / "eager.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vla.decoding.eager", module)
    spec.loader.exec_module(module)
    shutil.copytree(config_dir() / "decoder", tmp_path / "configs" / "decoder")
    (tmp_path / "configs" / "decoder" / "eager.yaml").write_text(config)
    monkeypatch.setattr(configs, "config_dir", lambda: tmp_path / "configs")
    assert configs.describe(configs.load("decoder", "eager"))["below"] == 0.5
    again = {}
    for name, path in (("entries", decode_entries.__file__), ("cases", "tests/contracts/test_decoders.py")):
        spec = importlib.util.spec_from_file_location(f"again_{name}", PAGE.parents[2] / path)
        again[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, again[name])
        spec.loader.exec_module(again[name])
    found = {entry.name for entry in again["entries"].ENTRIES} - set(BY_NAME)
    assert found == {"eager bins", "eager FAST"}
    assert "eager" in again["cases"].CASES and "eager" not in again["cases"].EXACT
