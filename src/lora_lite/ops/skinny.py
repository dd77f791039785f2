"""Products with a side of few rows, one pass over the long tensor each.

Each has a plain form, which defines it, and a Triton kernel for CUDA tensors. The small factors may
be wider floats than the tokens; they are cast where they are read. With `energies` a kernel sums
the squares of what it reads on its way, and the plain forms do not.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.ops.launch import kernels, kernels_serve
from lora_lite.ops.selection import Squares

MOST_ROWS = 128


def down(
    x: Float[Tensor, "T d"], A: Float[Tensor, "r d"], scale: float = 1.0
) -> Float[Tensor, "T r"]:
    """scale · x Aᵀ."""
    if has_kernel(x, A.shape[0]):
        return kernels("skinny").down(x, A, scale)
    h = x @ A.to(x.dtype).T
    return h if scale == 1 else h * scale


def up(
    h: Float[Tensor, "T r"],
    B: Float[Tensor, "n r"],
    b: Float[Tensor, " n"] | Float[Tensor, "T n"] | None = None,
) -> Float[Tensor, "T n"]:
    """h Bᵀ + b, b one row for all tokens or a row for each."""
    if has_kernel(h, h.shape[1]):
        return kernels("skinny").up(h, B, b)
    B = B.to(h.dtype)
    return h @ B.T if b is None else torch.addmm(b, h, B.T)


def outer(
    h: Float[Tensor, "T r"],
    x: Float[Tensor, "T d"],
    like: Float[Tensor, "q d"],
    energies: bool = False,
) -> tuple[Float[Tensor, "q d"], Squares | None]:
    """The first q rows of hᵀ x, summed over the tokens, in the dtype and layout of `like`: the
    gradient to such a factor, which is then taken without a copy. And the squares of x."""
    if has_kernel(x, h.shape[1]):
        return kernels("skinny").outer(h, x, like, energies)
    return (h[:, : like.shape[0]].T @ x).to(like.dtype), None


def down_and_outer(
    g: Float[Tensor, "T n"],
    B: Float[Tensor, "n r"],
    h: Float[Tensor, "T r"],
    scale: float,
    dtype: torch.dtype,
    q: int | None = None,
    energies: bool = False,
) -> tuple[Float[Tensor, "T r"], Float[Tensor, "n q"], Squares | None]:
    """(scale · g B, gᵀ h in a dtype): what y = h Bᵀ, h = scale · p, gives back to p and to B; to
    the q columns that all parts of B have in common but for a constant, the sum over the parts.
    And the squares of g."""
    q = h.shape[1] if q is None else q
    if has_kernel(g, h.shape[1]):
        return kernels("skinny").down_and_outer(g, B, h, scale, dtype, q, energies)
    dp = g @ B.to(g.dtype)
    dB = (g.T @ h).unflatten(1, (-1, q)).sum(1)
    return dp if scale == 1 else dp * scale, dB.to(dtype), None


def scaled_up(
    z: Float[Tensor, "T n"],
    h: Float[Tensor, "T r"],
    B: Float[Tensor, "n r"],
    g_1: Float[Tensor, " n"],
    b: Float[Tensor, " n"] | None,
) -> tuple[Float[Tensor, "T n"], Float[Tensor, "T n"]]:
    """(y, u) with u = z + h Bᵀ and y = (1 + g_1) ⊙ u + b; without a bias y alone, twice. Takes
    z's memory."""
    if has_kernel(z, h.shape[1]):
        return kernels("skinny").scaled_up(z, h, B, g_1, b)
    u = z.addmm_(h, B.to(z.dtype).T)
    y = u + g_1.to(u.dtype) * u
    return (y, y) if b is None else (y + b, u)


def scaled_down_and_outer(
    dy: Float[Tensor, "T n"],
    out: Float[Tensor, "T n"],
    B: Float[Tensor, "n r"],
    h: Float[Tensor, "T r"],
    g_1: Float[Tensor, " n"],
    scale: float,
    scaled: bool,
    energies: bool = False,
) -> tuple[
    Float[Tensor, "T n"],
    Float[Tensor, "T r"],
    Float[Tensor, "n r"],
    Float[Tensor, " n"],
    Squares | None,
]:
    """(du, scale · du B, duᵀ h, Σ_t dy ⊙ u) for du = (1 + g_1) ⊙ dy, where `out` is u, or if
    `scaled` (1 + g_1) ⊙ u, in which u keeps all its digits however small the factor. And the
    squares of dy."""
    if has_kernel(dy, h.shape[1]):
        return kernels("skinny").scaled_down_and_outer(dy, out, B, h, g_1, scale, scaled, energies)
    du = dy + g_1.to(dy.dtype) * dy
    dg = (dy * out).sum(0, dtype=g_1.dtype)
    if scaled:
        dg = torch.where(g_1 == -1, 0, dg / (1 + g_1))
    return du, du @ B.to(du.dtype) * scale, (du.T @ h).to(B.dtype), dg, None


def has_kernel(x: Tensor, rows: int) -> bool:
    """Whether the kernel serves x: 16-bit floats on CUDA, few rows, and any tokens."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and 0 < rows <= MOST_ROWS
        and x.shape[0] > 0
        and kernels_serve(x)
    )
