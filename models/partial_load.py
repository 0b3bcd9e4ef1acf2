"""Lets modules that use a part of a published network load its complete state dict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def ignore_published(module: nn.Module, *prefixes: str) -> None:
    """Makes `module` skip the keys that begin with one of `prefixes`.

    All other keys must match. The caller's state dict is not changed.
    """

    def skip(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Mapping[str, object]) -> None:
        for key in [key for key in state if key.startswith(tuple(prefix + p for p in prefixes))]:
            del state[key]

    module.register_load_state_dict_pre_hook(skip)  # type: ignore[no-untyped-call]
