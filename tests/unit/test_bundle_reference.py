"""docs/reference/bundle.md names every key of bundle.json, with its type and its default."""

from __future__ import annotations

import re
import types
import typing
from enum import StrEnum
from typing import Any

import msgspec
import pytest

from rafaga import bundle
from tests.documents import ROOT

PAGE = (ROOT / "docs/reference/bundle.md").read_text()
STRUCTS = [s for s in bundle.Frozen.__subclasses__() if s.__module__ == bundle.__name__]
WORDS = {str: "string", int: "integer", float: "number", bool: "boolean"}


def words(annotation: Any) -> str:
    """The type as the page writes it."""
    arguments = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType):
        return " or ".join("null" if part is type(None) else words(part) for part in arguments)
    if typing.get_origin(annotation) is tuple:
        item = words(arguments[0])
        return f"list of {f'({item})' if ' or ' in item else item + ('' if '[' in item else 's')}"
    if typing.get_origin(annotation) is dict:
        return f"object of {words(arguments[1])}s"
    if issubclass(annotation, bundle.Frozen):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return "string" if issubclass(annotation, StrEnum) else WORDS[annotation]


def default(field: msgspec.structs.FieldInfo) -> str:
    return "" if field.required else f"`{msgspec.json.encode(field.default).decode()}`"


@pytest.mark.parametrize("struct", STRUCTS)
def test_the_page_lists_every_key(struct: type[msgspec.Struct]) -> None:
    (section,) = re.findall(rf"^## {struct.__name__}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    found = [[cell.strip() for cell in row.split(" |")[:3]] for row in re.findall(r"^\| (`\w+` .*)\|$", section, re.M)]
    assert found == [[f"`{f.name}`", words(f.type), default(f)] for f in msgspec.structs.fields(struct)]


def test_the_tasks_and_what_they_need_are_listed() -> None:
    (section,) = re.findall(r"^## Tasks\n(.*?)^## ", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == [str(task) for task in bundle.Task]
