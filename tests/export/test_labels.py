"""Labels files in their usual forms, and the class of a photo from its folder or its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.labels import Labels, LabelsInvalid, class_of, read_labels

# ImageNet has two classes called crane, a bird and a machine.
BIRDS = Labels(("crane", "great white heron", "great", "crane"), ("n02012849", "n02009912", "n00000001", "n03126707"))


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_plain_lines(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, "labels.txt", "tench\n\ngreat white shark \n")) == Labels(
        ("tench", "great white shark")
    )


def test_lines_with_identifiers(tmp_path: Path) -> None:
    found = read_labels(write(tmp_path, "synset.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n"))
    assert found == Labels(("tench, Tinca tinca", "goldfish"), ("n01440764", "n01443537"))


def test_json(tmp_path: Path) -> None:
    index = write(tmp_path, "index.json", '{"1": ["n2", "b"], "0": ["n1", "a"]}')
    assert read_labels(index) == Labels(("a", "b"), ("n1", "n2"))
    assert read_labels(write(tmp_path, "list.json", '["a", "b"]')) == Labels(("a", "b"))


@pytest.mark.parametrize("text", ['{"1": ["n2", "b"]}', '{"0": "a"}', "{", "[1]"])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(LabelsInvalid, match=r"index\.json: expected"):
        read_labels(write(tmp_path, "index.json", text))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelsInvalid, match="is empty"):
        read_labels(write(tmp_path, "labels.txt", "\n"))


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ("n02012849_crane.JPEG", 0),
        ("n03126707_crane.JPEG", 3),
        ("great_white_heron_17.jpg", 1),
        ("great_17.jpg", 2),
        ("crane_1.jpg", None),  # which of the two?
        ("1.jpg", 1),
        ("great white heron/17.jpg", 1),
        ("n03126707/heron.jpg", 3),
        ("unknown/great_1.jpg", 2),
        ("unknown/17.jpg", None),
    ],
)
def test_class_of_a_photo(photo: str, expected: int | None) -> None:
    folder = Path("photos")
    assert class_of(folder / photo, folder, BIRDS.index()) == expected
