"""Class names of a model, and the class of a labelled photo.

    labels.txt      one class per line, in the order of the outputs; "n01440764 tench" gives the identifier first
    labels.json     {"0": ["n01440764", "tench"], ...} as Keras and others publish ImageNet's classes, or ["tench", ...]

A photo's class is the name of its folder (`<class>/photo.jpg`) or, where asked, the beginning of its own name
(`<class>_photo.jpg`). A class is written as its identifier or, where that is unambiguous, as its label or number.
Photos with several labels, or with values, have a file labels.csv in their folder.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:  # `verify` and `report` run without torch
    from torch import nn

ClassesFrom = Literal["folder", "file"]

LINES = "labels.csv"

_IMAGENET_CLASSES = 1000
_COCO_CLASSES = 91  # with the background
_IDENTIFIER = re.compile(r"(n\d{8})\s+(.+)")


class LabelsInvalid(Exception):
    """A labels file cannot be read, or a photo's class is unknown."""


@dataclass(frozen=True)
class Labels:
    """`names[i]`: the class of output i; `identifiers`: empty, or one per name. `notes`: what is odd in the file."""

    names: tuple[str, ...]
    identifiers: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def index(self) -> dict[str, int]:
        """The class number by every name that a folder or file may use. Ambiguous names are left out."""
        spellings = [{str(i), _spelling(name)} for i, name in enumerate(self.names)]
        for spelling, identifier in zip(spellings, self.identifiers, strict=False):
            spelling.add(_spelling(identifier))
        uses = Counter(word for spelling in spellings for word in spelling)
        return {word: i for i, spelling in enumerate(spellings) for word in spelling if uses[word] == 1}


def read_labels(path: Path) -> Labels:
    """Raises LabelsInvalid, or OSError where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a byte-order mark
    except UnicodeDecodeError:
        raise LabelsInvalid(f"{path}: expected UTF-8 text") from None
    if path.suffix == ".json":
        found = _from_json(text, path)
    else:
        lines = [line.strip() for line in text.rstrip().splitlines()]
        notes = tuple(f"{path}: line {i} is empty and was skipped" for i, line in enumerate(lines, 1) if not line)
        found = Labels(tuple(filter(None, lines)), notes=notes)
    if not found.names:
        raise LabelsInvalid(f"{path} is empty: expected one class per line")
    pairs = [_IDENTIFIER.fullmatch(name) for name in found.names]
    if path.suffix != ".json" and all(pairs):
        found = replace(found, names=tuple(p[2] for p in pairs if p), identifiers=tuple(p[1] for p in pairs if p))
    numbers: dict[str, list[int]] = {}
    for i, name in enumerate(found.names):
        numbers.setdefault(name, []).append(i)
    twice = (
        f"{path}: {name!r} names the classes {', '.join(map(str, same))}"
        for name, same in numbers.items()
        if len(same) > 1
    )
    return replace(found, notes=(*found.notes, *twice))


def default_labels(model: nn.Module, classes: int) -> tuple[str, ...]:
    """For a model without a labels file: ImageNet's names for torchvision's networks of 1000 classes, COCO's for its
    detectors of 91, else numbers."""
    (theirs,) = getattr(model, "original", (model,))
    module = type(theirs).__module__
    if classes == _IMAGENET_CLASSES and module.startswith("torchvision.models"):
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    if classes == _COCO_CLASSES and module.startswith("torchvision.models.detection"):
        from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

        return tuple(FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"])
    return tuple(map(str, range(classes)))


def class_of(photo: Path, index: dict[str, int], classes_from: ClassesFrom = "folder") -> int | None:
    """The class of `photo`; None if the name of its folder, or its own name, does not give it."""
    if classes_from == "folder":
        return index.get(_spelling(photo.parent.name))
    words = _spelling(photo.stem).split()
    # The longest beginning first: "great white shark 7" before "great".
    beginnings = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    return next((index[beginning] for beginning in beginnings if beginning in index), None)


def lines_of(files: Sequence[Path], folder: Path, expected: str) -> Iterator[tuple[str, list[str]]]:
    """Of labels.csv in `folder`: the path of each of `files` and the words after it. Raises LabelsInvalid."""
    path = folder / LINES
    if not path.is_file():
        raise LabelsInvalid(f"{path}: missing; expected lines such as photo.jpg,{expected}")
    with path.open(newline="", encoding="utf-8-sig") as text:
        lines = {line[0].strip(): [word.strip() for word in line[1:]] for line in csv.reader(text) if line}
    for file in files:
        name = file.relative_to(folder).as_posix()
        if name not in lines:
            raise LabelsInvalid(f"{path}: no line for {name}; expected {name},{expected}")
        yield name, lines[name]


def _spelling(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).lower()


def _from_json(text: str, path: Path) -> Labels:
    try:
        if text.lstrip().startswith("["):
            return Labels(msgspec.json.decode(text, type=tuple[str, ...]))
        pairs = msgspec.json.decode(text, type=dict[str, tuple[str, str]])
        ordered = [pairs[str(i)] for i in range(len(pairs))]
    except (msgspec.MsgspecError, KeyError) as error:
        raise LabelsInvalid(
            f"{path}: expected a list of names, or identifier and name by class number ({error})"
        ) from None
    return Labels(tuple(name for _, name in ordered), tuple(identifier for identifier, _ in ordered))
