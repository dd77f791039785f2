"""Small rotations from skew-symmetric matrices, as what they differ from the identity by.

R − I is what is stored and cast: near the identity it keeps its digits where R would lose them.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.ops.launch import kernels, ops_serve
from lora_lite.ops.one_op import once_differentiable, one_op

MOST_COLUMNS = 64


def skew(q: Float[Tensor, "*batch e"], b: int) -> Float[Tensor, "*batch {b} {b}"]:
    """Q with Q[i, j] = q and Q[j, i] = −q for i < j, q in row-major order, e = b(b − 1)/2."""
    i, j = torch.triu_indices(b, b, 1, device=q.device)
    Q = q.new_zeros(*q.shape[:-1], b * b)
    Q = Q.index_copy(-1, torch.cat([i * b + j, j * b + i]), torch.cat([q, -q], -1))
    return Q.unflatten(-1, (b, b))


def cayley(q: Float[Tensor, "n e"], b: int) -> Float[Tensor, "n {b} {b}"]:
    """R − I = 2 Q (I − Q)⁻¹ for R = (I + Q)(I − Q)⁻¹, Q = skew(q): a rotation."""
    if has_kernel(q, b):
        return _rotation(q, b, None)
    Q = skew(q, b)
    eye = torch.eye(b, dtype=Q.dtype, device=Q.device)
    # Never singular, so nothing need be checked, which would wait for the device.
    return torch.linalg.solve_ex(eye - Q, 2 * Q).result


def cayley_neumann(q: Float[Tensor, "n e"], b: int, terms: int) -> Float[Tensor, "n {b} {b}"]:
    """R − I for R = (I + Q)(I + Q + … + Q^(terms−2)), the Neumann series of the Cayley transform.

    Qiu et al. 2025, arXiv:2506.19847, §3.3.
    """
    if has_kernel(q, b):
        return _rotation(q, b, terms)
    Q = skew(q, b)
    U = torch.zeros_like(Q)
    for _ in range(terms - 2):
        U = Q + Q @ U
    return U + Q + Q @ U


def has_kernel(q: Tensor, b: int) -> bool:
    """Whether the kernel serves q."""
    return ops_serve(q) and q.dtype == torch.float32 and 2 <= b <= MOST_COLUMNS


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, b: int, terms: int | None) -> Tensor:
        R_1, X = kernels("cayley").rotation(q.contiguous(), b, terms)
        ctx.save_for_backward(q if X is None else X)
        ctx.terms = terms
        return R_1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None]:
        return kernels("cayley").backward(G.contiguous(), *ctx.saved_tensors, ctx.terms), None, None


_rotation = one_op(_Rotation)
