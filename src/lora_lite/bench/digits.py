"""The task `digits`: from upright handwritten digits to digits turned by 90°.

Data: the 1797 handwritten digits (8×8 pixels, scaled to [0, 1]) that scikit-learn ships: the test
part of "Optical Recognition of Handwritten Digits", Alpaydin & Kaynak 1998, UCI, CC BY 4.0.
Split: one permutation (torch generator, seed 0) cut into 897 training, 300 validation and 600 test
images. The source domain is the images as they are; the target domain is the same images turned a
quarter counter-clockwise, in the same split: no test image is seen in training in either domain. A
quarter turn moves pixels and blurs none, and makes no two digits alike (a half turn would, 6 and
9): what the base lacks there is geometry, not information.
Base: `ViT()` pretrained on the source training images by `python -m lora_lite.bench.pretrain`.
Adapting sees the target training images and nothing of the source.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor

from lora_lite.bench.vit import ViT

SPLITS = {"train": 897, "validation": 300, "test": 600}
BASE_PATH = Path(__file__).with_name("digits_vit.safetensors")


class Split(NamedTuple):
    """Images, their labels, and their rows in scikit-learn's order."""

    images: Float[Tensor, "n 8 8"]
    labels: Int64[Tensor, " n"]
    rows: Int64[Tensor, " n"]

    def to(self, device: str) -> "Split":
        return Split(*(t.to(device) for t in self))


@cache
def source(split: str) -> Split:
    """The upright digits of "train", "validation" or "test"."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = dict(zip(SPLITS, order.split(list(SPLITS.values()))))[split]
    return Split(images[rows], labels[rows], rows)


@cache
def target(split: str) -> Split:
    """The same digits, each turned a quarter counter-clockwise."""
    upright = source(split)
    return upright._replace(images=upright.images.rot90(1, (1, 2)))


def base_model() -> ViT:
    """A fresh copy of the shipped base, in evaluation mode."""
    model = ViT()
    model.load_state_dict(load_file(BASE_PATH))
    return model.eval()


@torch.no_grad()
def score(model: torch.nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy in percent and mean cross-entropy on a split, in evaluation mode."""
    was_training = model.training
    logits = model.eval()(split.images)
    model.train(was_training)
    accuracy = (logits.argmax(1) == split.labels).double().mean().item()
    return 100 * accuracy, torch.nn.functional.cross_entropy(logits, split.labels).item()
