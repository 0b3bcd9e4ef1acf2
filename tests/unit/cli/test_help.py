"""Every --help is readable on a terminal of 80 columns; completion knows every command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rafaga.cli._completion import SHELLS
from tests.unit.cli.conftest import Rafaga

COMMANDS = {
    *("backtest", "classify", "completion", "demo", "detect", "features", "forecast", "infer", "load"),
    *("models", "plan", "predict", "segment", "serve", "top"),
}


@pytest.mark.parametrize("words", [[], *([command] for command in sorted(COMMANDS)), ["load", "merge"]])
def test_help_fits_80_columns(words: list[str], monkeypatch: pytest.MonkeyPatch, rafaga: Rafaga) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = rafaga(*words, "--help")
    assert code == 0
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "positional arguments" not in text, "every argument is in a named group"
    if words != ["load", "merge"]:
        assert f"  rafaga {' '.join(words)}".rstrip() in text[text.index("example") :]
    if not words:
        commands = text[text.index("COMMAND\n") :].splitlines()[1:]
        assert {line.split()[0] for line in commands if line.startswith("    ")} == COMMANDS


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str, tmp_path: Path, rafaga: Rafaga) -> None:
    code, text, _ = rafaga("completion", shell)
    assert code == 0
    for word in (*COMMANDS, "min-score", "max-queue-wait-ms", "slo-p99-ms"):
        assert word in text
    (tmp_path / "script").write_text(text)
    if shutil.which(shell):
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


def test_bash_completes(tmp_path: Path, rafaga: Rafaga) -> None:
    (tmp_path / "script").write_text(rafaga("completion", "bash").out)
    (tmp_path / "photo.png").touch()
    for words, completed in (
        ("rafaga cl", "classify"),
        ("rafaga detect --dr", "--draw"),
        ("rafaga completion f", "fish"),
        ("rafaga classify pho", "photo.png"),
    ):
        code = f"source ./script; COMP_WORDS=({words}); COMP_CWORD={words.count(' ')}; _shtab_rafaga"
        ask = ["bash", "-c", f"{code}; printf '%s\\n' \"${{COMPREPLY[@]}}\""]
        done = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.split() == [completed]


def test_the_base_install_sends_requests_and_names_what_else_is_needed() -> None:
    """Without a single package of the extras."""
    extras = ("onnxruntime", "msgspec", "PIL", "prometheus_client", "rich", "grpc_health", "matplotlib", "hdrh")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); from rafaga.cli import main; sys.exit(main())"

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout + done.stderr

    needed = "rafaga: rafaga top needs prometheus_client, which is not installed: pip install 'rafaga[load]'\n"
    assert run("top", "--once") == (1, needed)
    for command in ("serve", "demo"):
        assert "which is not installed: pip install 'rafaga[server]'" in run(command)[1]
    for words in (["classify", "--help"], ["completion", "bash"]):
        status, said = run(*words)
        assert (status, "classify" in said) == (0, True)
