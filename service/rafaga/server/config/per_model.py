"""Settings with one value for all models, and other values for single models: `2,lenet5=1`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rafaga.bundle import NAME_PATTERN

T = TypeVar("T")


@dataclass(frozen=True)
class PerModel(Generic[T]):
    default: T
    by_model: Mapping[str, T] = field(default_factory=dict)

    @classmethod
    def parse(cls, rules: Iterable[str], value: Callable[[str], T], default: T) -> PerModel[T]:
        """`rules`: at most one value for all models (else `default`), and at most one `NAME=value` for each model.

        `value` reads one value. Raises ValueError, as `value` does.
        """
        for_all: list[T] = []
        by_model: dict[str, T] = {}
        for rule in rules:
            name, named, text = rule.rpartition("=")
            if not named:
                if for_all:
                    raise ValueError(f"{rule!r}: expected only one value for all models")
                for_all.append(value(text))
            elif not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"{rule!r}: expected the name of a model before '='")
            elif name in by_model:
                raise ValueError(f"{rule!r}: expected only one value for {name}")
            else:
                by_model[name] = value(text)
        return cls(for_all[0] if for_all else default, by_model)

    def of(self, name: str) -> T:
        return self.by_model.get(name, self.default)
