"""Layers this small are slower on several threads than on one, much slower on a busy machine."""

import torch

torch.set_num_threads(1)
