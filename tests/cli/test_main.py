"""The command line itself: quick help, one message per error, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest

from vla.cli import main as cli
from vla.errors import BundleError, ConfigError

RUN = (sys.executable, "-m", "vla.cli.main")


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *words], capture_output=True, text=True, timeout=120)


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vla.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'torch', 'hydra', 'rich', 'mujoco') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    for word in ("demo", "doctor", "info", "collect", "train", "eval", "setup", "bench"):
        assert word in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS, ids=[" ".join(c.path) for c in cli.COMMANDS])
def test_every_command_explains_itself(command: cli.Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.path, "--help"])
    assert ended.value.code == 0
    assert f"vla {' '.join(command.path)}" in capsys.readouterr().out


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([])
    assert "vla doctor" in capsys.readouterr().out


def test_a_group_alone_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["setup"])
    assert "libero" in capsys.readouterr().out


class _Command:
    """Stands in for a command module; `run` raises what it is told to."""

    def __init__(self, error: BaseException):
        self.error = error

    def add_arguments(self, parser: object) -> None:
        pass

    def run(self, args: object) -> int:
        raise self.error


def run_raising(error: BaseException, monkeypatch: pytest.MonkeyPatch, words: Sequence[str] = ("info",)) -> int:
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: _Command(error))
    return cli.main(list(words))


def test_our_errors_are_one_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(ConfigError("seed: expected x"), monkeypatch) == 2
    assert capsys.readouterr().err == "vla: seed: expected x\n"


def test_debug_and_foreign_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError):
        run_raising(BundleError("broken"), monkeypatch, ("info", "--debug"))
    with pytest.raises(ZeroDivisionError):
        run_raising(ZeroDivisionError(), monkeypatch)


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_raising(KeyboardInterrupt(), monkeypatch) == 130


def test_unknown_bundle_from_the_shell() -> None:
    done = call("info", "no_such_bundle", "--json")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    message = json.loads(done.stderr)
    assert message["error"] == "BundleError" and "no_such_bundle" in message["message"]


def test_version() -> None:
    assert call("--version").stdout.startswith("vla-stack ")
