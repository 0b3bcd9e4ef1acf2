"""Labels files in their usual forms, and the class of a photo from its folder or its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from torchvision import models

from export.labels import Labels, LabelsInvalid, class_of, default_labels, read_labels

# ImageNet has two classes called crane, a bird and a machine.
BIRDS = Labels(("crane", "great white heron", "great", "crane"), ("n02012849", "n02009912", "n00000001", "n03126707"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("labels.txt", "tench\n\ngreat white shark \n", Labels(("tench", "great white shark"))),
        (
            "synset.txt",
            "n01440764 tench, Tinca tinca\nn01443537 goldfish\n",
            Labels(("tench, Tinca tinca", "goldfish"), ("n01440764", "n01443537")),
        ),
        ("index.json", '{"1": ["n2", "b"], "0": ["n1", "a"]}', Labels(("a", "b"), ("n1", "n2"))),
        ("list.json", '["a", "b"]', Labels(("a", "b"))),
        ("index.json", '{"1": ["n2", "b"]}', r"index\.json: expected"),
        ("index.json", '{"0": "a"}', r"index\.json: expected"),
        ("index.json", "{", r"index\.json: expected"),
        ("list.json", "[1]", r"list\.json: expected"),
        ("labels.txt", "\n", "is empty"),
    ],
)
def test_forms_of_labels_files(name: str, text: str, expected: Labels | str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    if isinstance(expected, Labels):
        assert read_labels(tmp_path / name) == expected
    else:
        with pytest.raises(LabelsInvalid, match=expected):
            read_labels(tmp_path / name)


def test_what_is_odd_in_a_labels_file_is_noticed(tmp_path: Path) -> None:
    """A byte-order mark belongs to no class."""
    path = tmp_path / "labels.txt"
    path.write_text("\ufeffcat\n\ndog\ncat\n\n", encoding="utf-8")
    found = read_labels(path)
    assert found.names == ("cat", "dog", "cat")
    assert found.notes == (f"{path}: line 2 is empty and was skipped", f"{path}: 'cat' names the classes 0, 2")
    path.write_text("cat\ndog\n", encoding="utf-16")
    with pytest.raises(LabelsInvalid, match="expected UTF-8"):
        read_labels(path)


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ("n02012849_crane.JPEG", 0),
        ("n03126707_crane.JPEG", 3),
        ("great_white_heron_17.jpg", 1),
        ("great_17.jpg", 2),
        ("crane_1.jpg", None),  # ambiguous
        ("1.jpg", 1),
        ("n03126707/great_1.jpg", 2),
    ],
)
def test_class_of_a_photo_by_its_name(photo: str, expected: int | None) -> None:
    assert class_of(Path("photos") / photo, BIRDS.index(), "file") == expected


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ("great white heron/17.jpg", 1),
        ("n03126707/heron.jpg", 3),
        ("unknown/great_1.jpg", None),
        ("great_17.jpg", None),
    ],
)
def test_class_of_a_photo_by_its_folder(photo: str, expected: int | None) -> None:
    assert class_of(Path("photos") / photo, BIRDS.index()) == expected


def test_a_network_of_torchvision_with_1000_classes_has_imagenets_names() -> None:
    of_torchvision = models.SqueezeNet()
    assert default_labels(of_torchvision, 1000)[:2] == ("tench", "goldfish")
    assert default_labels(of_torchvision, 3) == ("0", "1", "2")
    assert default_labels(nn.Linear(1, 1000), 1000)[999] == "999"
