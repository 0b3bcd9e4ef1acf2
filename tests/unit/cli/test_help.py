"""Every --help is readable on a terminal of 80 columns; completion knows every command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rafaga.cli import main
from rafaga.cli._completion import SHELLS

COMMANDS = {
    *("backtest", "classify", "completion", "demo", "detect", "features", "forecast", "infer", "load"),
    *("models", "plan", "predict", "segment", "serve", "top"),
}


def help_of(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [[], *([command] for command in sorted(COMMANDS)), ["load", "merge"]])
def test_help_fits_80_columns(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(words, monkeypatch, capsys)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "positional arguments" not in text, "every argument is in a named group"
    if words != ["load", "merge"]:
        assert f"  rafaga {' '.join(words)}".rstrip() in text[text.index("example") :]


def test_every_command_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of([], monkeypatch, capsys)
    listed = [line.split()[0] for line in text[text.index("COMMAND\n") :].splitlines()[1:] if line.startswith("    ")]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for word in (*COMMANDS, "min-score", "max-queue-wait-ms", "slo-p99-ms"):
        assert word in text
    (tmp_path / "script").write_text(text)
    if shutil.which(shell):
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        code = f"source ./script; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_rafaga"
        ask = f"{code}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.split()

    assert completed("rafaga", "cl") == ["classify"]
    assert completed("rafaga", "detect", "--dr") == ["--draw"]
    assert completed("rafaga", "completion", "f") == ["fish"]
    (tmp_path / "photo.png").touch()
    assert completed("rafaga", "classify", "pho") == ["photo.png"]


def test_the_base_install_sends_requests_and_names_what_else_is_needed() -> None:
    """Without a single package of the extras."""
    extras = ("onnxruntime", "msgspec", "PIL", "prometheus_client", "rich", "grpc_health", "matplotlib", "hdrh")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); from rafaga.cli import main; sys.exit(main())"

    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    assert run("classify", "--help")[0] == 0
    status, said = run("top", "--once")
    assert (status, said) == (
        1, "rafaga: rafaga top needs prometheus_client, which is not installed: pip install 'rafaga[load]'\n"
    )  # fmt: skip
    for command in ("serve", "demo"):
        assert "which is not installed: pip install 'rafaga[server]'" in run(command)[1]
    status, said = run("completion", "bash")
    assert (status, "classify" in said) == (0, True)
