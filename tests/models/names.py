"""The names of the catalogue, written by hand, so that a test notices every change."""

from __future__ import annotations

NAMES = {
    "lenet5-mnist",
    "cnn-mnist",
    "resnet20-cifar10",
    "plain20-cifar10",
    "resnet56-cifar10",
    "plain56-cifar10",
    "lstm-co2",
    "rnn-co2",
    "lstm-ett",
    "lstm-sp500",
    "lstm-reber",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vgg16",
    "vgg19",
    "googlenet",
    "plain34",
    "resnet50-backbone",
    "resnet50-fpn",
    "vgg16-backbone",
    "googlenet-backbone",
    "vgg16-embedding",
    "fcn-resnet50",
    "ssd300-vgg16",
    "fasterrcnn-resnet50-fpn",
}
