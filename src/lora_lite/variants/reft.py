"""LoReFT and DiReFT."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import BlockBase
from lora_lite.variant import ParamSpec, Stats, Variant, normal, zeros


class Intervention(Variant, abstract=True):
    """An edit of a block's output h at the first p and the last s tokens of each prompt, one for
    all of them or, untied, one for each."""

    site = "block"
    needs_prompt = True
    r: int = 4
    p: int = 7
    s: int = 7
    tied: bool = True

    def validate(self) -> None:
        if min(self.p, self.s) < 0 or self.p + self.s < 1:
            raise ValueError(f"p={self.p} and s={self.s} must be ≥ 0, and one of them ≥ 1")

    def check(self, d_in: int, d_out: int) -> None:
        if self.r > d_in:
            raise ValueError(f"has a width of {d_in}, less than r={self.r}; use r ≤ {d_in}")

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        return dict(d=d_in, n=1 if self.tied else self.p + self.s)

    def nonlinear(self) -> str:
        return "what it does to a token depends on where the token stands"

    def edited(
        self, x: Tensor, W: BlockBase, U: Float[Tensor, "n r d"], V: Tensor, b: Tensor
    ) -> Float[Tensor, "batch tokens d"]:
        """h + Uᵀ(V h + b) at those tokens."""
        h = W(x)
        at, there = (t[..., None] for t in W.prompt.columns(h, self.p, self.s))
        at = at.expand(-1, -1, h.shape[-1])
        U, V, b = (t.expand(at.shape[1], *t.shape[1:]) for t in (U, V, b))
        # Padding may hold NaN, which no product with 0 takes away.
        e = torch.einsum("btd,trd->btr", h.gather(1, at).where(there, 0), V) + b
        edit = torch.einsum("btr,trd->btd", e, U).where(there, 0)
        return h.scatter_add(1, at, edit.to(h.dtype))


class LoReFT(Intervention, name="reft", aliases=("loreft",)):
    """Edit hidden states in a subspace: h' = h + Rᵀ(A h + b − R h), R of orthonormal rows.

    Wu et al. 2024, arXiv:2404.03592, §3.2 eq. 2; the paper's W is A here. At chosen tokens of the
    prompt alone, §4.1: the first p and the last s, never of what is generated.

    Start: the identity bit for bit, in tensors as wide as the model's and at least float32: A = R
    and b = 0.
    Shapes: R, A (n, r, d), b (n, r), n = 1 or, untied, p + s; n·(2·r·d + r) parameters.
    Differs: 1. A and b start so, where the authors' first code moves h at once. 2. The last token
    of the prompt is edited, and untied each position has its own edit, as the paper says and their
    code does not. 3. R's rows are made orthonormal by a Cholesky factor of R Rᵀ.
    """

    R: Float[Tensor, "n r d"] = ParamSpec()
    A: Float[Tensor, "n r d"] = ParamSpec()
    b: Float[Tensor, "n r"] = ParamSpec(zeros)

    def init(
        self, W: BlockBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        n = self.sizes(W.d_in, W.d_out)["n"]
        G = torch.randn(n, W.d_in, self.r, generator=generator, dtype=torch.float64)
        R = torch.linalg.qr(G).Q.mT.float().double()
        return dict(R=R, A=orthonormal(R))

    def check_tensors(self, d_in: int, d_out: int, R: Tensor, **others: Tensor) -> None:
        sizes = torch.linalg.svdvals(R.double())
        if (sizes[:, -1] <= 1e-7 * sizes[:, 0]).any():
            raise ValueError("has an R of dependent rows, which no orthonormal ones span")

    def prepare(self, W: BlockBase, R: Tensor, A: Tensor, b: Tensor) -> dict[str, Tensor]:
        R = orthonormal(R)
        return dict(R=R, A_R=A - R, b=b)

    def forward(
        self, x: Float[Tensor, "batch tokens d"], W: BlockBase, R: Tensor, A_R: Tensor, b: Tensor
    ) -> Float[Tensor, "batch tokens d"]:
        return self.edited(x, W, R, A_R, b)


class DiReFT(Intervention):
    """LoReFT without its constraints: h' = h + W₂ᵀ(W₁ h + b).

    Wu et al. 2024, arXiv:2404.03592, §3.2 eq. 3.

    Start: the identity bit for bit, since W₂ = 0.
    Shapes: W1, W2 (n, r, d), b (n, r), as LoReFT's.
    """

    W1: Float[Tensor, "n r d"] = ParamSpec(normal(0.02))
    W2: Float[Tensor, "n r d"] = ParamSpec(zeros)
    b: Float[Tensor, "n r"] = ParamSpec(zeros)

    def forward(
        self, x: Float[Tensor, "batch tokens d"], W: BlockBase, W1: Tensor, W2: Tensor, b: Tensor
    ) -> Float[Tensor, "batch tokens d"]:
        return self.edited(x, W, W2, W1, b)


def orthonormal(R: Float[Tensor, "n r d"]) -> Float[Tensor, "n r d"]:
    """L⁻¹ R for R Rᵀ = L Lᵀ: R itself where its rows are orthonormal. In float64 and rounded once,
    so that a fresh A is R to the last bit."""
    R_64 = R.double()
    L = torch.linalg.cholesky_ex(R_64 @ R_64.mT).L
    return torch.linalg.solve_triangular(L, R_64, upper=False).to(R.dtype)
