"""Trainable tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64, Shaped
from torch import Tensor

from lora_lite.base import EmbeddingBase, TiedHeadBase, a_few
from lora_lite.variant import ParamSpec, Stats, Variant

MADE_AGAIN = dict(trainable=False, saved=False)


class TrainableTokens(Variant, name="trainable_tokens"):
    """Train some rows of an embedding: E' = E with the rows token_indices replaced by T.

    PEFT's method of this name; there is no paper. Heads and other embeddings that share the weight
    have E' too.

    Start: the identity bit for bit: T is a copy of the rows.
    Shapes: tokens (n, d), T, row k for token_indices[k]; n·d parameters.
    Differs: 1. what is added is the difference T − E, so that adapters compose and nothing of
    the table's size is made. 2. A padding index trains like any other.
    """

    site = "embedding"
    token_indices: tuple[int, ...] = ()

    tokens: Float[Tensor, "n d_out"] = ParamSpec(decay=False)
    index: Int64[Tensor, "n"] = ParamSpec(**MADE_AGAIN)
    slot: Int32[Tensor, "d_in"] = ParamSpec(**MADE_AGAIN)

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        return dict(n=len(self.token_indices))

    def check(self, d_in: int, d_out: int) -> None:
        if not self.token_indices:
            raise ValueError("is to train no token; say which by token_indices=(…)")
        seen = set()
        for i in self.token_indices:
            if not 0 <= i < d_in:
                raise ValueError(f"has {d_in} rows, and token_indices has {i}; use 0 … {d_in - 1}")
            if i in seen:
                raise ValueError(f"would train row {i} twice; say it once in token_indices")
            seen.add(i)

    def fingerprint_rows(self, W: EmbeddingBase) -> Tensor:
        """Of those that it leaves alone: new tokens' rows start at random each time."""
        kept = torch.ones(W.d_in, dtype=torch.bool)
        kept[list(self.token_indices)] = False
        return W.weight[a_few(kept.nonzero()[:, 0]).to(W.device)]

    def init(
        self, W: EmbeddingBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        if W.layer.max_norm is not None:
            raise ValueError("rescales its rows where it looks them up; set its max_norm to None")
        index = torch.tensor(self.token_indices)
        slot = torch.full((W.d_in,), len(index), dtype=torch.int32)
        slot[index] = torch.arange(len(index), dtype=torch.int32)
        return dict(tokens=W.weight[index.to(W.device)], index=index, slot=slot)

    def prepare(
        self, W: EmbeddingBase | TiedHeadBase, tokens: Tensor, index: Tensor, slot: Tensor
    ) -> dict[str, Tensor]:
        E = W.weight
        if len(slot) != len(E):
            raise ValueError(
                f"trainable_tokens: the embedding has {len(E)} rows, and had {len(slot)} when it "
                "was adapted; resize first, then attach"
            )
        return dict(delta=tokens - E[index], index=index, slot=slot)

    def forward(
        self,
        x: Shaped[Tensor, "..."],
        W: EmbeddingBase | TiedHeadBase,
        delta: Float[Tensor, "n d"],
        index: Tensor,
        slot: Tensor,
    ) -> Float[Tensor, "... out"]:
        if isinstance(W, EmbeddingBase):
            rows = F.pad(delta, (0, 0, 0, 1))  # and one of zeros for all other tokens
            return W(x) + W.scale * F.embedding(slot[x], rows)
        return W(x).index_add(-1, index, x @ delta.T)
