"""Which versions of a model to serve: the newest, the N newest, all, or a list of numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rafaga.bundle import NAME_PATTERN, VERSION_PATTERN


@dataclass(frozen=True)
class VersionPolicy:
    """For one model. `newest`: how many of the newest, None for all. `specific`, if not empty: exactly these."""

    newest: int | None = 1
    specific: tuple[int, ...] = ()

    def wanted(self, there: Collection[int]) -> list[int]:
        """In rising order. Specific versions are returned even if they do not exist."""
        if self.specific:
            return sorted(self.specific)
        return sorted(there)[-self.newest :] if self.newest is not None else sorted(there)


@dataclass(frozen=True)
class Versions:
    """`default` applies to models without a policy of their own."""

    default: VersionPolicy = VersionPolicy()
    by_model: Mapping[str, VersionPolicy] = field(default_factory=dict)

    @classmethod
    def parse(cls, rules: Iterable[str]) -> Versions:
        """`latest`, `latest:2` or `all` for every model; `NAME=…` for one, also with numbers: `NAME=1,3`.

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
                    raise ValueError(f"expected one rule for all models, got another: {rule!r}")
                default = _policy(policy, numbers=False)
            elif not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"expected the name of a model before '=', got {name!r}")
            elif name in by_model:
                raise ValueError(f"expected one rule for {name}, got another: {rule!r}")
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
    raise ValueError(f"expected latest, latest:N, all, or NAME= before numbers of versions, got {text!r}")


def _number(text: str) -> int:
    if not VERSION_PATTERN.fullmatch(text):
        raise ValueError(f"expected an integer ≥ 1 of at most 18 digits, got {text[:20]!r}")
    return int(text)
