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
    ("given", "guess"),
    [
        (".", "did you mean {root}/models?"),
        ("loose", "did you mean {root}/loose/net.onnx?"),
        ("models/a/empty", "found an empty folder"),
        ("many", "found 0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 1 more"),
    ],
)
def test_a_repository_without_models_says_what_was_found_and_where_they_may_be(
    tmp_path: Path, given: str, guess: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "models/a/1")
    for folder in ("loose", "models/a/empty", "many"):
        (tmp_path / folder).mkdir()
    for file in ("loose/net.onnx", "loose/old.onnx", *(f"many/{n}.csv" for n in range(6))):
        (tmp_path / file).write_bytes(b"")
    discovery = Discovery(tmp_path / given)
    for _ in range(3):
        assert discovery.scan() == {}
    (record,) = caplog.records
    assert record.getMessage().startswith(f"no model found: expected {(tmp_path / given).resolve()}/<model>/<version>/")
    assert record.getMessage().endswith(guess.format(root=tmp_path))


@pytest.mark.parametrize(
    ("given", "served"),
    [
        ("models/a", {"a": {1: "models/a/1", 2: "models/a/2"}}),
        ("models/a/2", {"a": {2: "models/a/2"}}),
        ("models/a/2/model.onnx", {"a": {2: "models/a/2"}}),
        ("my net", {"my-net": {1: "my net"}}),
        ("moved", {"digits": {7: "moved"}}),
        ("moved/model.onnx", {"digits": {7: "moved"}}),
        ("moved/model.int8.onnx", {"model.int8": {1: "moved/model.int8.onnx"}}),
        ("broken", {"broken": {1: "broken"}}),
        ("_net (2).onnx", {"net--2-": {1: "_net (2).onnx"}}),
        ("link.onnx", {"link": {1: "link.onnx"}}),
    ],
)
def test_one_model_is_recognised(
    tmp_path: Path, given: str, served: dict[str, dict[int, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Its folder, a version of it, a moved bundle, or an ONNX file. Other models in its folder are not served."""
    put(tmp_path, "models/a/1", "models/a/2", "models/b/1", "my net", "moved", "broken")
    (tmp_path / "moved/bundle.json").write_text('{"name": "digits", "version": 7}')
    (tmp_path / "broken/bundle.json").write_text("{")
    for file in ("moved/model.int8.onnx", "_net (2).onnx"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "link.onnx").symlink_to("moved/model.onnx")
    expected = {name: {n: tmp_path / path for n, path in folders.items()} for name, folders in served.items()}
    assert Discovery(tmp_path / given).scan() == expected
    assert not caplog.records


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a/1")
    monkeypatch.chdir(tmp_path / "a")
    assert Discovery(Path()).scan() == {"a": {1: tmp_path / "a/1"}}


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"net\.pth is not an ONNX file: expected a model repository, the folder"
    ):
        Discovery(tmp_path / "net.pth").scan()


def test_links_of_folders_stay_in_the_repository(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As git-sync makes them: the repository is a link, and so are a model and a version in it. Those that lead out of
    it are refused by name."""
    put(tmp_path, "real/.store/a/1", "real/b/1", "elsewhere/c/1")
    for link, target in (
        ("a", ".store/a"),
        ("b/2", "../.store/a/1"),
        ("c", "../elsewhere/c"),
        ("b/3", "../../elsewhere/c/1"),
    ):
        (tmp_path / "real" / link).symlink_to(target)
    (tmp_path / "current").symlink_to("real")
    assert found(tmp_path / "current") == {"a": [1], "b": [1, 2]}
    assert len(caplog.messages) == 2
    for link, target in (("c", "c"), ("b/3", "c/1")):
        text = f"{tmp_path}/current/{link} is not served: it is a link to {tmp_path}/elsewhere/{target}, outside"
        assert text in caplog.text
