"""`rafaga classify | detect | segment | features`: many images in, one answer per image, files that fail alone."""

from __future__ import annotations

import glob
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from rafaga import Box, Classification, Client, Detections, Features, RafagaError, Results, Segmentation
from rafaga.cli._errors import ExitCode, UsageError, complain, exit_code, needed_by, sentence
from rafaga.cli._models import chosen
from rafaga.cli._output import Cell, Figure, show_footer, show_json, show_table, warn_if_untrained
from rafaga.options import IMAGES, files_in

A = TypeVar("A", Classification, Detections, Segmentation, Features)
Failure = RafagaError | OSError


class Image(NamedTuple):
    name: str
    content: Path | bytes


@dataclass(frozen=True)
class _View(Generic[A]):
    """How answers of one kind are shown: a table with `rows` per image, or a JSON object."""

    headings: tuple[str, ...]
    rows: Callable[[A], Iterable[Sequence[Cell]]]
    document: Callable[[A], dict[str, Any]]
    nothing: str = ""  # printed for an image without rows


def classify(args: Namespace, client: Client) -> int:
    images = expand(args.images)
    model = chosen(args, client, "classification")
    found = client.classify_many(
        [image.content for image in images],
        model=model,
        version=args.model_version,
        top_k=args.top_k,
        min_probability=args.min_probability,
    )
    view: _View[Classification] = _View(
        ("RANK", "LABEL", "INDEX", "PROBABILITY"),
        lambda answer: [
            (rank, p.label, p.index, f"{p.probability:.4f}") for rank, p in enumerate(answer.predictions, start=1)
        ],
        lambda answer: {"predictions": answer.predictions},
        nothing=f"nothing with a probability of {args.min_probability:g} or more",
    )
    if any(answer.values for answer in found.outcomes if not isinstance(answer, Failure)):
        view = _View(
            ("OUTPUT", "VALUE"),
            lambda answer: list(answer.values.items()),
            lambda answer: {"values": answer.values},
        )
    return _show(args.json, images, found, view)


def detect(args: Namespace, client: Client) -> int:
    images = expand(args.images)
    pictures = _pictures(args.draw, images)
    model = chosen(args, client, "detection")
    found = client.detect_many(
        [image.content for image in images],
        model=model,
        version=args.model_version,
        min_score=args.min_score,
        max_objects=args.max_objects,
    )
    _draw(pictures, images, found)
    view: _View[Detections] = _View(
        ("LABEL", "SCORE", "X MIN", "Y MIN", "X MAX", "Y MAX"),
        lambda answer: [
            (each.label, f"{each.score:.4f}", *(round(corner, 1) for corner in _corners(each.box))) for each in answer
        ],
        lambda answer: {
            "objects": answer.objects,
            "image_height": answer.image_height,
            "image_width": answer.image_width,
        },
        nothing=f"nothing with a score of {args.min_score:g} or more",
    )
    return _show(args.json, images, found, view, {"drawn": pictures})


def segment(args: Namespace, client: Client) -> int:
    images = expand(args.images)
    pictures = _pictures(args.draw, images)
    arrays = _targets("--output", args.output, images, ".npy")
    model = chosen(args, client, "segmentation")
    found = client.segment_many([image.content for image in images], model=model, version=args.model_version)
    _draw(pictures, images, found)
    _write(arrays, found, lambda file, answer: np.save(file, answer.full_size()))
    view: _View[Segmentation] = _View(
        ("LABEL", "INDEX", "SHARE", "PROBABILITY"),
        lambda answer: [
            (c.label, c.index, Figure(f"{100 * c.share:.2f} %"), f"{c.probability:.4f}") for c in answer.classes
        ],
        lambda answer: {
            "classes": answer.classes,
            "image_height": answer.image_height,
            "image_width": answer.image_width,
        },
    )
    return _show(args.json, images, found, view, {"drawn": pictures, "output": arrays})


def features(args: Namespace, client: Client) -> int:
    images = expand(args.images)
    arrays = _targets("--output", args.output, images, ".npz")
    model = chosen(args, client, "features")
    found = client.features_many([image.content for image in images], model=model, version=args.model_version)
    _write(arrays, found, _save_maps)
    view: _View[Features] = _View(
        ("MAP", "STRIDE", "SHAPE"),
        lambda answer: [(m.name, m.stride or "", " x ".join(map(str, m.array.shape))) for m in answer],
        lambda answer: {"maps": [{"name": m.name, "stride": m.stride, "shape": m.array.shape} for m in answer]},
    )
    return _show(args.json, images, found, view, {"output": arrays})


def _save_maps(file: Any, answer: Features) -> None:
    np.savez(file, **{m.name: m.array for m in answer})  # type: ignore[arg-type]  # savez's own flag is a bool


def expand(words: Sequence[str]) -> list[Image]:
    """The images that the command line names: files, folders with all in them and below, patterns, and - for standard
    input. Raises UsageError for a folder or a pattern without images; a file that is missing fails alone, later."""
    images: list[Image] = []
    for word in words:
        path = Path(word)
        if word == "-":
            images.append(Image("stdin", sys.stdin.buffer.read()))
        elif path.is_dir():
            found = files_in(path, IMAGES)
            if not found:
                raise UsageError(f"{word}: no {', '.join(sorted(IMAGES))} file in this folder")
            images += [Image(str(file), file) for file in found]
        elif glob.has_magic(word) and not path.exists():
            matches = sorted(name for name in glob.glob(word, recursive=True) if Path(name).is_file())
            if not matches:
                raise UsageError(f"{word}: no file matches this pattern")
            images += [Image(name, Path(name)) for name in matches]
        else:
            images.append(Image(word, path))
    return images


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.x_min, box.y_min, box.x_max, box.y_max


def _targets(option: str, given: Path | None, images: Sequence[Image], suffix: str) -> list[Path] | None:
    """The file to write for each image: `given`, or if that is a folder one in it with the image's name."""
    if given is None:
        return None
    if not given.is_dir():
        if len(images) > 1:
            raise UsageError(f"{option} {given}: {len(images)} images need an existing folder, not a file")
        return [given]
    targets = [given / (Path(image.name).stem + suffix) for image in images]
    if twice := [str(target) for target in targets if targets.count(target) > 1]:
        raise UsageError(f"{option} {given}: two of the images would be written to {twice[0]}")
    return targets


def _write(targets: list[Path] | None, found: Results[A], save: Callable[[Any, A], object]) -> None:
    for target, answer in zip(targets or (), found.outcomes, strict=targets is not None):
        if not isinstance(answer, Failure):
            with target.open("wb") as file:
                save(file, answer)


def _pictures(given: Path | None, images: Sequence[Image]) -> list[Path] | None:
    """The targets of --draw. Raises NotInstalled, before anything is sent."""
    if given is not None:
        with needed_by("--draw", "pillow"):
            import PIL.Image  # noqa: F401
    return _targets("--draw", given, images, ".png")


def _draw(
    targets: list[Path] | None, images: Sequence[Image], found: Results[Detections] | Results[Segmentation]
) -> None:
    if targets is None:
        return
    from rafaga.cli._draw import drawn

    for target, image, answer in zip(targets, images, found.outcomes, strict=True):
        if not isinstance(answer, Failure):
            data = image.content if isinstance(image.content, bytes) else image.content.read_bytes()
            drawn(data, answer).save(target)


def _show(
    as_json: bool,
    images: Sequence[Image],
    found: Results[A],
    view: _View[A],
    written: dict[str, list[Path] | None] | None = None,
) -> ExitCode:
    """Prints every answer, and reports every file that failed; the exit code is that of the first."""
    files = {key: list(map(str, paths)) for key, paths in (written or {}).items() if paths}
    succeeded = [(image.name, a) for image, a in zip(images, found.outcomes, strict=True) if not isinstance(a, Failure)]
    failed = [(image.name, a) for image, a in zip(images, found.outcomes, strict=True) if isinstance(a, Failure)]
    if as_json:
        show_json(
            [
                _failure(image.name, answer)
                if isinstance(answer, Failure)
                else {"file": image.name, **view.document(answer), "model": answer.model, "timing": answer.timing}
                | {key: paths[number] for key, paths in files.items()}
                for number, (image, answer) in enumerate(zip(images, found.outcomes, strict=True))
            ]
        )
    elif succeeded:
        _tables(succeeded, len(images) > 1, view)
    if succeeded:
        warn_if_untrained(succeeded[0][1].model)
    for name, error in failed:
        complain(sentence(error) if isinstance(error, OSError) else f"{name}: {sentence(error)}")
    return exit_code(failed[0][1]) if failed else ExitCode.OK


def _named(name: str, rows: Sequence[Sequence[Cell]]) -> list[Sequence[Cell]]:
    """`rows` with a first column, which has the name in the first row."""
    return [(name if number == 0 else "", *row) for number, row in enumerate(rows)]


def _tables(answers: Sequence[tuple[str, A]], several: bool, view: _View[A]) -> None:
    """One table of all answers, with the names of the files if there are several."""
    rows: list[Sequence[Cell]] = []
    empty: list[str] = []
    for name, answer in answers:
        own: list[Sequence[Cell]] = list(view.rows(answer))
        rows += _named(name, own) if several else own
        if not own:
            empty.append(name)
    if rows:
        show_table(("FILE", *view.headings) if several else view.headings, rows)
    for name in empty:
        print(f"{name}: {view.nothing}")
    last = answers[-1][1]
    if several:
        print(f"\n{last.model}: {len(answers)} images")
    else:
        show_footer(last.model, last.timing)


def _failure(name: str, error: Failure) -> dict[str, Any]:
    reason = error.reason if isinstance(error, RafagaError) else "FILE"
    return {"file": name, "error": {"reason": reason, "message": sentence(error)}}
