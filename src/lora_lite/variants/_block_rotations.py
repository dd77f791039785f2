"""What OFT and its kin share: blocks along a layer's input."""

from lora_lite.variant import Variant


class BlockRotations(Variant, abstract=True):
    """n blocks of b inputs each, said by their size or by their number."""

    usual_block_size = 32
    block_size: int | None = None
    n_blocks: int | None = None

    @property
    def together(self) -> tuple[int, str]:
        """How many blocks a layer must have, or a multiple, of even size if more than one; and what
        wants it."""
        return 1, ""

    def validate(self) -> None:
        if self.block_size is not None and self.n_blocks is not None:
            raise ValueError("block_size and n_blocks say the same thing; give one of them")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} must be ≥ 2: smaller rotates nothing")
        if self.n_blocks is not None and self.n_blocks < 1:
            raise ValueError(f"n_blocks={self.n_blocks} must be ≥ 1")

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        b = d_in // self.n_blocks if self.n_blocks else self.block_size or self.usual_block_size
        return dict(b=b, n=d_in // b)

    def check(self, d_in: int, d_out: int) -> None:
        many, why = self.together
        fit = [b for b in range(2, d_in + 1, 2 if many > 1 else 1) if d_in % (b * many) == 0]
        key, asked = "block_size", self.block_size or self.usual_block_size
        if self.n_blocks:
            key, asked, fit = "n_blocks", self.n_blocks, [d_in // b for b in reversed(fit)]
        if asked not in fit:
            need = f" with {why}, {many} even blocks or a multiple," if many > 1 else ""
            use = (
                f"use {', '.join(map(str, fit[:8]))}" if fit else "no size fits, exclude the layer"
            )
            raise ValueError(f"has in_features={d_in}, and {key}={asked}{need} does not fit; {use}")
