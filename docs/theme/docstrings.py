"""Griffe's extension for the SDK's reference: docstrings, which are plain text, as Markdown.

Examples (`>>> …`) become code blocks; lines that begin with a parameter's name and a colon become items of a list.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*\n?(?:^\S.*\n?|^ +\S.*\n?)*", re.MULTILINE)
_PARAMETER = re.compile(r"^([a-z_0-9]+): ", re.MULTILINE)


def markdown(text: str) -> str:
    text = re.sub(r" *# doctest: \+SKIP", "", text)
    text = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
    return _PARAMETER.sub(r"- `\1`: ", text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
