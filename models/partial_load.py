"""Modules that use part of a published network still load its state dict as it was published."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def ignore_published(module: nn.Module, *prefixes: str) -> None:
    """Makes `module` skip the keys that begin with one of `prefixes`: parts that it does without.

    All other keys must match, as ever. The caller's state dict is left as it is.
    """

    def skip(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Mapping[str, object]) -> None:
        for key in [key for key in state if key.startswith(tuple(prefix + p for p in prefixes))]:
            del state[key]

    module.register_load_state_dict_pre_hook(skip)  # type: ignore[no-untyped-call]
