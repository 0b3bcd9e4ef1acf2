"""How torchvision and timm prepared images for the weights that they publish, read from the weights' metadata."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rafaga.bundle import Interpolation, sha256_of

# These builders normalise within the network only if they are given the weights' name: as built here, they take -1..1.
_INPUT_AROUND_ZERO = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Preset:
    """`source`: whose metadata. `size`: height and width of the centre crop, None where any size is taken.
    `resize_shorter` None: images are resized to `size` without cropping, or not at all."""

    source: str
    size: tuple[int, int] | None
    resize_shorter: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation

    def shorter_for(self, size: tuple[int, int]) -> int | None:
        """`resize_shorter` for another size, in proportion: the crop keeps the same part of the image."""
        if self.size is None or self.resize_shorter is None:
            return None
        return max(*size, round(self.resize_shorter * max(size) / max(self.size)))


def preset_of(factory: Callable[..., object], weights: str) -> Preset | None:
    """None without metadata, or if `factory` is not from torchvision or timm. `weights`: the option, or a file."""
    package = str(getattr(factory, "__module__", "")).partition(".")[0]
    if package == "torchvision":
        return _of_torchvision(factory, weights)
    return _of_timm(factory) if package == "timm" else None


def _of_torchvision(factory: Callable[..., object], weights: str) -> Preset | None:
    from torchvision.models import get_model_weights

    try:
        members: list[Any] = list(get_model_weights(factory))
    except (ValueError, RuntimeError):  # a class, or a function of another kind
        return None
    member = _published_as(members, weights)
    used = member or type(members[0]).DEFAULT
    preset = used.transforms()
    if not hasattr(preset, "interpolation"):
        return None
    crop, shorter = getattr(preset, "crop_size", None), preset.resize_size
    mean, std = tuple(preset.mean), tuple(preset.std)
    if factory.__name__ in _INPUT_AROUND_ZERO:
        mean = std = (0.5,) * 3
    others = "" if member or len(members) == 1 else "; its other weights may differ"
    return Preset(
        f"torchvision's {type(used).__name__}.{used.name}{others}",
        (crop[0], crop[0]) if crop else None,
        shorter[0] if shorter else None,
        mean,
        std,
        Interpolation(preset.interpolation.value),
    )


def _published_as(members: list[Any], weights: str) -> Any:
    """The member whose file is `weights`, by its name or by the beginning of its SHA-256, which is part of the name."""
    path = Path(weights)
    if not path.is_file():
        return None
    files = {member.url.rpartition("/")[2]: member for member in members}
    if path.name in files:
        return files[path.name]
    digest = sha256_of(path)
    return next((m for file, m in files.items() if digest.startswith(Path(file).stem.rpartition("-")[2])), None)


def _of_timm(factory: Callable[..., object]) -> Preset | None:
    found: Any = importlib.import_module("timm.models").get_pretrained_cfg(factory.__name__)
    if found is None:
        return None
    _, height, width = found.input_size
    whole = found.crop_mode == "squash" and found.crop_pct == 1
    known = found.interpolation in tuple(Interpolation)
    return Preset(
        f"timm's configuration of {factory.__name__}",
        (height, width),
        None if whole else math.floor(min(height, width) / found.crop_pct),
        tuple(found.mean),
        tuple(found.std),
        Interpolation(found.interpolation) if known else Interpolation.BICUBIC,
    )
