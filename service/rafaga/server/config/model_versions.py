"""Which versions of a model are served: the newest one, the newest N, all, or a list."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rafaga.bundle import VERSION_PATTERN
from rafaga.server.config.per_model import PerModel


@dataclass(frozen=True)
class VersionPolicy:
    """For one model. newest: how many; None: all. specific: if not empty, exactly these."""

    newest: int | None = 1
    specific: tuple[int, ...] = ()

    def wanted(self, there: Collection[int]) -> list[int]:
        """In ascending order. Specific versions are wanted even if they are not in `there`."""
        if self.specific:
            return sorted(self.specific)
        return sorted(there)[-self.newest :] if self.newest is not None else sorted(there)


Versions = PerModel[VersionPolicy]


def parse_versions(words: Sequence[str]) -> Versions:
    """`latest`, `latest:2` or `all` for all models; `NAME=…` for one model, also with numbers: `NAME=1`, `3`.

    Raises ValueError.
    """
    rules: list[str] = []
    for word in words:
        if word.isdecimal() and rules and rules[-1].rpartition("=")[2].replace(",", "").isdecimal():
            rules[-1] += f",{word}"
        else:
            rules.append(word)
    found = PerModel.parse(rules, _policy, VersionPolicy())
    if found.default.specific:
        rule = next(rule for rule in rules if "=" not in rule)
        raise ValueError(f"{rule!r}: expected latest, latest:N, all, or NAME= before version numbers")
    return found


def _policy(text: str) -> VersionPolicy:
    kind, _, count = text.partition(":")
    if text == "all":
        return VersionPolicy(newest=None)
    if kind == "latest":
        return VersionPolicy(newest=_number(count) if ":" in text else 1)
    if text[:1].isdecimal():
        return VersionPolicy(specific=tuple(map(_number, text.split(","))))
    raise ValueError(f"{text!r}: expected latest, latest:N, all, or NAME= before version numbers")


def _number(text: str) -> int:
    if not VERSION_PATTERN.fullmatch(text):
        raise ValueError(f"{text[:20]!r}: expected an integer from 1, of at most 18 digits")
    return int(text)
