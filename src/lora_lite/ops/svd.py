"""Truncated singular value decomposition, of a matrix and of what is summed over tokens."""

import functools
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

WIDE = 2048
OVERSAMPLING = 10
POWER_ITERATIONS = 4

SvdMethod = Literal["auto", "exact", "randomised"]


def is_randomised(method: SvdMethod, r: int, n: int, m: int) -> bool:
    """Whether r singular triplets of an n × m matrix are found by the randomised algorithm: by
    default above 2048 both ways, for up to a quarter of the triplets."""
    if method == "auto":
        return min(n, m) > WIDE and 4 * r <= min(n, m)
    return method == "randomised"


def truncated_svd(
    W: Float[Tensor, "n m"], r: int, method: SvdMethod = "auto", seed: int = 0
) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"], Float[Tensor, "r m"]]:
    """Leading r singular triplets of W, singular values in falling order: W ≈ U diag(S) Vᵀ.

    `randomised` is Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1, with
    r extra directions, at least 10, and 4 power iterations, seeded. Where singular values fall as
    k^−0.3 or faster, what it leaves of W is within 0.1 % of the least (Frobenius), and S within
    1 %; for a matrix of noise 0.2 % and 4 %.
    """
    if is_randomised(method, r, *W.shape):
        generator = torch.Generator().manual_seed(seed)
        width = min(r + max(r, OVERSAMPLING), *W.shape)
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


@functools.cache
def sketching(d: int, k: int) -> Float[Tensor, "{d} q"]:
    """Ω, made once and the same everywhere, by which k leading eigenvectors of a d × d matrix C are
    found from C Ω: q = 8 k + 10 orthonormal random directions, or the identity if d is no more."""
    if (q := 8 * k + 10) >= d:
        return torch.eye(d)
    return torch.linalg.qr(torch.randn(d, q, generator=torch.Generator().manual_seed(0))).Q


def nystrom(
    Y: Float[Tensor, "d q"], Omega: Float[Tensor, "d q"], k: int, eps: float
) -> tuple[Float[Tensor, "d {k}"], Float[Tensor, " {k}"]]:
    """The k leading eigenvectors and eigenvalues, falling, of the positive semidefinite C of which
    Y = C Ω is known to a relative eps, Ω having orthonormal columns; exact for a square Ω.

    The fixed-rank Nyström approximation Y (Ωᵀ Y)⁺ Yᵀ, Tropp et al. 2017, arXiv:1706.05736, eqs. 1.1
    and 1.3; what of Ωᵀ Y is no more than rounding is left out of the inverse. With the Ω of
    `sketching`, at widths of 500 to 11008: where eigenvalues fall as k^−2 (the data's singular
    values as k^−1), the directions found miss 3e-5 of the trace that k directions can have, and
    eigenvalues are up to 4 % too small; where they fall as k^−1 (k^−0.5), 1.2 % and, the last of
    them, 42 %.
    """
    B = Omega.T @ Y
    b, Q = torch.linalg.eigh((B + B.T) / 2)
    if len(Q) == len(Y):
        return (Omega @ Q).flip(1)[:, :k], b.flip(0)[:k].clamp(min=0)
    known = torch.where(b > 10 * eps * b[-1], b, torch.inf)
    U, S, _ = torch.linalg.svd(Y @ (Q * known.rsqrt()), full_matrices=False)
    return U[:, :k], S[:k].square()
