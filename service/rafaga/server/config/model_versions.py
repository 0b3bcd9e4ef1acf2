"""Which versions of a model are served: the newest one, the newest N, all, or a list."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rafaga.bundle import NAME_PATTERN


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


@dataclass(frozen=True)
class Versions:
    """One policy for all models, and others for single models."""

    default: VersionPolicy = VersionPolicy()
    by_model: Mapping[str, VersionPolicy] = field(default_factory=dict)

    @classmethod
    def parse(cls, rules: Iterable[str]) -> Versions:
        """`latest`, `latest:2` or `all` for all models; `NAME=…` for one model, also with numbers: `NAME=1,3`.

        Raises ValueError.
        """
        default: VersionPolicy | None = None
        by_model: dict[str, VersionPolicy] = {}
        name = ""
        for rule in (part.strip() for text in rules for part in text.split(",")):
            if rule.isdecimal() and by_model.get(name, VersionPolicy()).specific:
                by_model[name] = VersionPolicy(specific=(*by_model[name].specific, _number(rule)))
                continue
            name, named, policy = rule.rpartition("=")
            if not named:
                if default is not None:
                    raise ValueError(f"{rule!r}: expected only one rule for all models")
                default = _policy(policy, numbers=False)
            elif not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"{rule!r}: expected the name of a model before '='")
            elif name in by_model:
                raise ValueError(f"{rule!r}: expected only one rule for {name}")
            else:
                by_model[name] = _policy(policy, numbers=True)
        return cls(default or VersionPolicy(), by_model)

    def wanted(self, name: str, there: Collection[int]) -> Sequence[int]:
        return self.by_model.get(name, self.default).wanted(there)


def _policy(text: str, *, numbers: bool) -> VersionPolicy:
    kind, _, count = text.partition(":")
    if text == "all":
        return VersionPolicy(newest=None)
    if kind == "latest":
        return VersionPolicy(newest=_number(count) if ":" in text else 1)
    if numbers and text.isdecimal():
        return VersionPolicy(specific=(_number(text),))
    raise ValueError(f"{text!r}: expected latest, latest:N, all, or NAME= before version numbers")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or text.startswith("0") or len(text) > 9:
        raise ValueError(f"{text!r}: expected an integer from 1 to 999999999")
    return int(text)
