"""Classifiers of small images: MNIST digits and CIFAR-10 photos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.entry import ImageInput
from models.progress import SILENT, Steps
from models.training.data import Images, Labels
from models.training.loop import Batch, Problem
from rafaga.bundle import Metric

Augmentation = Callable[[Tensor], Tensor]


class ImageClassification(Problem):
    """`images` uint8 [N, H, W] or [N, H, W, 3]; the module takes the output of `prepare`."""

    def __init__(
        self,
        module: nn.Module,
        prepared_as: ImageInput,
        training: tuple[Images, Labels],
        held_out: tuple[Images, Labels],
        held_out_name: str,
        augment: Augmentation,
        batch_size: int,
        bfloat16: bool = False,
    ) -> None:
        # Convolutions run faster on channels-last maps, the layout that `prepare` returns.
        self.module = module.to(memory_format=torch.channels_last)
        self.bfloat16 = bfloat16
        self.prepared_as = prepared_as
        self.images, self.labels = (torch.from_numpy(array.copy()) for array in training)
        self.held_out_images, self.held_out_labels = (torch.from_numpy(array.copy()) for array in held_out)
        self.held_out_name = held_out_name
        self.augment = augment
        self.batch_size = batch_size
        self.batches_per_epoch = len(self.images) // batch_size

    def batches(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.images))
        for index in torch.split(order[: self.batches_per_epoch * self.batch_size], self.batch_size):
            yield self.augment(prepare(self.images[index], self.prepared_as)), self.labels[index]

    def loss(self, batch: Batch) -> Tensor:
        images, labels = batch
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.module(images)
        return F.cross_entropy(logits.float(), labels)

    def evaluate(self, steps: Steps = SILENT) -> tuple[Metric, ...]:
        steps.step(f"measuring on {self.held_out_name}")
        correct, samples = 0, len(self.held_out_labels)
        with torch.inference_mode():
            for start in range(0, samples, 500):
                rows = slice(start, start + 500)
                logits = self.module(prepare(self.held_out_images[rows], self.prepared_as))
                correct += int((logits.argmax(1) == self.held_out_labels[rows]).sum())
                steps.advance(min(rows.stop, samples), samples)
        return (Metric(name="top1", value=correct / samples, dataset=self.held_out_name, samples=samples),)


def prepare(images: Tensor, prepared_as: ImageInput) -> Tensor:
    """uint8 [N, H, W] or [N, H, W, C] -> float32 [N, C, H, W], (x / 255 - mean) / std."""
    if images.ndim == 3:
        images = images[..., None]
    mean, std = torch.tensor(prepared_as.mean), torch.tensor(prepared_as.std)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def jitter_digits(images: Tensor) -> Tensor:
    """Small rotations (12 degrees), scalings (10 %), shears and shifts (2 pixels). [N, 1, 28, 28]"""
    n = len(images)
    angle, shear = (math.radians(12) * uniform(n) for _ in range(2))
    scale_x, scale_y = (1 + 0.1 * uniform(n) for _ in range(2))
    shift_x, shift_y = (2 / 14 * uniform(n) for _ in range(2))
    rows = (
        torch.stack([scale_x * angle.cos(), -scale_x * (angle + shear).sin(), shift_x], 1),
        torch.stack([scale_y * angle.sin(), scale_y * (angle + shear).cos(), shift_y], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def crop_and_flip(images: Tensor) -> Tensor:
    """Pads by 4, crops back at random, flips every other image (He et al. 2016, section 4.2). [N, 3, 32, 32]"""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (n, 1)), torch.randint(0, 9, (n, 1))
    rows = top + torch.arange(height)  # [N, H]
    columns = left + torch.arange(width)  # [N, W]
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def uniform(n: int) -> Tensor:
    """[N] in -1..1"""
    return torch.rand(n) * 2 - 1
