"""Truncated singular value decomposition."""

import torch
from jaxtyping import Float
from torch import Tensor

OVERSAMPLING = 10
POWER_ITERATIONS = 4


def truncated_svd(
    W: Float[Tensor, "n m"], r: int, method: str = "exact", seed: int = 0
) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"], Float[Tensor, "r m"]]:
    """Leading r singular triplets of W, singular values in falling order: W ≈ U diag(S) Vᵀ.

    `randomised` is Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1, with
    10 extra directions and 4 power iterations, seeded.
    """
    if method == "randomised":
        generator = torch.Generator().manual_seed(seed)
        width = min(r + OVERSAMPLING, *W.shape)
        omega = torch.randn(W.shape[1], width, generator=generator).to(W)
        Q = torch.linalg.qr(W @ omega).Q
        for _ in range(POWER_ITERATIONS):
            Q = torch.linalg.qr(W.T @ Q).Q
            Q = torch.linalg.qr(W @ Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
        U = Q @ U
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]
