"""Makes the base of the task `digits`: `python -m lora_lite.bench.pretrain`, about a minute."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lora_lite.bench.digits import BASE_PATH, score, source
from lora_lite.bench.vit import ViT

STEPS, BATCH_SIZE, LR, WEIGHT_DECAY, SEED = 3000, 64, 2e-3, 0.05, 0


def shifted(images: Float[Tensor, "n 8 8"]) -> Float[Tensor, "n 8 8"]:
    """Each image moved by −1, 0 or 1 pixel along both axes, zeros coming in."""
    n = len(images)
    down, right = torch.randint(3, (2, n, 1, 1))
    rows, columns = torch.arange(8)[:, None] + down, torch.arange(8) + right
    return F.pad(images, (1, 1, 1, 1))[torch.arange(n)[:, None, None], rows, columns]


def pretrain(steps: int = STEPS, seed: int = SEED) -> ViT:
    """A ViT trained on the upright training digits with shifts of one pixel."""
    torch.manual_seed(seed)
    model, (images, labels, _) = ViT(), source("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.1)
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH_SIZE,))
        loss = F.cross_entropy(model(shifted(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        one_cycle.step()
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)
    model = pretrain()
    save_file(model.state_dict(), BASE_PATH)
    for split in ("train", "validation"):
        print(f"{split}: {score(model, source(split))[0]:.2f} %")
    print(f"wrote {BASE_PATH.name}: {BASE_PATH.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
