"""Small rotations from skew-symmetric matrices."""

import torch
from jaxtyping import Float
from torch import Tensor


def skew(q: Float[Tensor, "*batch e"], b: int) -> Float[Tensor, "*batch {b} {b}"]:
    """Q with Q[i, j] = q and Q[j, i] = −q for i < j, q in row-major order, e = b(b − 1)/2."""
    i, j = torch.triu_indices(b, b, 1, device=q.device)
    Q = q.new_zeros(*q.shape[:-1], b * b)
    Q = Q.index_copy(-1, torch.cat([i * b + j, j * b + i]), torch.cat([q, -q], -1))
    return Q.unflatten(-1, (b, b))


def cayley(Q: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    """R = (I + Q)(I − Q)⁻¹: orthogonal with determinant +1 for skew-symmetric Q."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye - Q, eye + Q)


def cayley_neumann(Q: Float[Tensor, "*batch b b"], terms: int) -> Float[Tensor, "*batch b b"]:
    """R ≈ (I + Q)(I + Q + … + Q^(terms−2)), the Neumann series of the Cayley transform.

    Qiu et al. 2025, arXiv:2506.19847, §3.3.
    """
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    series = eye
    for _ in range(terms - 2):
        series = eye + Q @ series
    return series + Q @ series
