"""Which folders are found, and what the log says about the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from rafaga.server.repository.discovery import Discovery


def put(root: Path, *folders: str) -> None:
    """Folders with a model.onnx each."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / "model.onnx").write_bytes(b"")


def found(root: Path) -> dict[str, list[int]]:
    return {name: sorted(folders) for name, folders in Discovery(root).scan().items()}


@pytest.mark.parametrize("name", ["LeNet5", "a", "0", "R_v.2-x", "x" * 128])
def test_names(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, f"{name}/1", f"{name}/1700000000", f"{name}/{10**18 - 1}")
    assert found(tmp_path) == {name: [1, 1_700_000_000, 10**18 - 1]}
    assert not caplog.records


@pytest.mark.parametrize(
    ("folder", "rule"),
    [
        ("a b", "a model's name has 1 to 128 letters"),
        ("dígits", "a model's name"),
        ("x" * 129, "a model's name"),
        ("-a", "begins with a letter or digit"),
        ("a/v1", "a version is an integer ≥ 1"),
        ("a/01", "without leading zeros"),
        ("a/0", "a version is an integer ≥ 1"),
        ("a/1000000000000000000", "at most 18 digits"),
        ("a/١", "a version is"),
        ("a", "expected a folder per version, move its files to"),
    ],
)
def test_a_folder_that_cannot_be_served_is_logged_once_with_the_rule(
    tmp_path: Path, folder: str, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "good/1", folder)
    discovery = Discovery(tmp_path)
    for _ in range(3):
        assert discovery.scan() == {"good": {1: tmp_path / "good/1"}}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"{tmp_path / folder} is not served: ")
    assert rule in record.getMessage()


def test_hidden_folders_and_files_are_not_worth_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "good/1", ".git/1", "..data/1", "lost+found/1", "good/.2-tmp", "good/..data")
    (tmp_path / "README.md").write_text("")
    (tmp_path / "good/config.pbtxt").write_text("")
    assert found(tmp_path) == {"good": [1]}
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "likely"),
    [("models/a/1", "models"), ("models/a", "models"), (".", "models"), ("models/a/empty", None), ("empty", None)],
)
def test_a_repository_without_models_guesses_where_they_are(
    tmp_path: Path, given: str, likely: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """One level too deep, two, one too high, or nothing near."""
    put(tmp_path, "models/a/1")
    for empty in ("models/a/empty", "empty"):
        (tmp_path / empty).mkdir()
    discovery = Discovery(tmp_path / given)
    for _ in range(3):
        assert discovery.scan() == {}
    (record,) = caplog.records
    assert record.getMessage().startswith(f"no model found: expected {(tmp_path / given).resolve()}/<model>/<version>/")
    guess = f"did you mean {tmp_path / likely}?" if likely else "bundle.json"
    assert record.getMessage().endswith(guess)


def test_links_of_folders_inside_the_repository_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As git-sync makes them: the repository is a link, and so are a model and a version in it."""
    put(tmp_path, "real/.store/a/1", "real/b/1")
    (tmp_path / "real/a").symlink_to(".store/a")
    (tmp_path / "real/b/2").symlink_to("../.store/a/1")
    (tmp_path / "current").symlink_to("real")
    assert found(tmp_path / "current") == {"a": [1], "b": [1, 2]}
    assert not caplog.records


def test_links_of_folders_out_of_the_repository_are_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "elsewhere/a/1", "models/b/1")
    (tmp_path / "models/a").symlink_to(tmp_path / "elsewhere/a")
    (tmp_path / "models/b/2").symlink_to(tmp_path / "elsewhere/a/1")
    assert found(tmp_path / "models") == {"b": [1]}
    for link, target in (("a", "a"), ("b/2", "a/1")):
        text = f"{tmp_path}/models/{link} is not served: it is a link to {tmp_path}/elsewhere/{target}, outside"
        assert text in caplog.text
