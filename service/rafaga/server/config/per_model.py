"""Settings with a value for every model, and others for some by their names: `2,lenet5=1`."""

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
        """`rules`: at most one value for all, else `default`, and one `NAME=value` for each other. `value` reads one.

        Raises ValueError, as `value` does.
        """
        for_all: list[T] = []
        by_model: dict[str, T] = {}
        for rule in rules:
            name, named, text = rule.rpartition("=")
            if not named:
                if for_all:
                    raise ValueError(f"expected one value for all models, got another: {rule!r}")
                for_all.append(value(text))
            elif not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"expected the name of a model before '=', got {name!r}")
            elif name in by_model:
                raise ValueError(f"expected one value for {name}, got another: {rule!r}")
            else:
                by_model[name] = value(text)
        return cls(for_all[0] if for_all else default, by_model)

    def of(self, name: str) -> T:
        return self.by_model.get(name, self.default)


@dataclass(frozen=True)
class EngineSettings:
    """One model's engines. instances: on each device. threads: ONNX Runtime's, of each engine on the CPU; None: its
    share of the cores, or one where a timed run says so. spinning: whether those spin while they wait; None: where
    cores are left over."""

    instances: int = 1
    threads: int | None = None
    spinning: bool | None = None


def at_least_one(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 6 or int(text) < 1:
        raise ValueError(f"expected a whole number from 1 on, got {text[:20]!r}")
    return int(text)


def at_least_one_or_auto(text: str) -> int | None:
    return None if text == "auto" else at_least_one(text)


def on_off_or_auto(text: str) -> bool | None:
    """`true` and `false` are what TOML and environments call them."""
    words = {"auto": None, "on": True, "true": True, "off": False, "false": False}
    if text not in words:
        raise ValueError(f"expected auto, on or off, got {text[:20]!r}")
    return words[text]
