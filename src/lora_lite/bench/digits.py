"""The task `digits`: from upright handwritten digits to turned ones.

Data: the 1797 handwritten digits (8×8 pixels, scaled to [0, 1]) that scikit-learn ships, from the
test set of Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), CC BY 4.0.
Split: one permutation (torch generator, seed 0) cut into 897 training, 300 validation and 600 test
images. The source domain is the images as they are, the target domain the same images turned by
`ANGLE_DEG` counter-clockwise about the centre (bilinear, zeros outside), with the same split: no
test image is ever seen in training, in either domain.
Base: `ViT()` pretrained on the source training images by `python -m lora_lite.bench.pretrain`.
Adapting sees the target training images only.
"""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor

from lora_lite.bench.vit import ViT

ANGLE_DEG = 75.0
SPLITS = {"train": 897, "validation": 300, "test": 600}
BASE_PATH = Path(__file__).with_name("digits_vit.safetensors")


class Split(NamedTuple):
    """Images, their labels, and their rows in scikit-learn's order."""

    images: Float[Tensor, "n 8 8"]
    labels: Int64[Tensor, " n"]
    rows: Int64[Tensor, " n"]


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
    """The same digits turned by `ANGLE_DEG`."""
    upright = source(split)
    return upright._replace(images=rotate(upright.images, ANGLE_DEG))


def rotate(images: Float[Tensor, "n 8 8"], angle_deg: float) -> Float[Tensor, "n 8 8"]:
    """Turned counter-clockwise about the centre, bilinear, zeros outside."""
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, (len(images), 1, 8, 8), align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def base_model() -> ViT:
    """A fresh copy of the shipped base, in evaluation mode."""
    model = ViT()
    model.load_state_dict(load_file(BASE_PATH))
    return model.eval()


@torch.no_grad()
def accuracy_pct(model: torch.nn.Module, split: Split) -> float:
    """Percentage of the split's digits that the model names, in evaluation mode."""
    was_training = model.training
    predicted = model.eval()(split.images).argmax(1)
    model.train(was_training)
    return 100 * (predicted == split.labels).double().mean().item()
