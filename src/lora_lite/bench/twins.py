"""PEFT's counterparts: the same function from the same tensors, for comparing and for timing.

One entry a method. A builder gets our configured variant and the names of the adapted layers, and
gives PEFT's configuration with a function that copies one layer's tensors over; None where PEFT
has no counterpart of this configuration. Conventions are those of PEFT 0.21.2, which
tests/fidelity/test_against_peft.py holds in value and gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.ops.cayley import skew
from lora_lite.variant import Variant

ADAPTER = "default"


@dataclass(frozen=True)
class Twin:
    """PEFT's configuration, and `load(their layer, our tensors)`. waits: whether a step makes the
    host wait for the device, as a library's solve does."""

    config: Any
    load: Callable[[Any, Mapping[str, Tensor]], None]
    waits: bool = False


Builder = Callable[[Any, list[str]], Twin | None]
TWINS: dict[str, Builder] = {}
"""By variant; a variant that is not here is timed without PEFT."""


def twin(variant: Variant, sites: list[str]) -> Twin | None:
    """PEFT's counterpart of a variant on these layers. Raises: ModuleNotFoundError without PEFT."""
    builder = TWINS.get(variant.name)
    return builder(variant, sites) if builder else None


def of(*names: str) -> Callable[[Builder], Builder]:
    """Enter a builder for these variants."""

    def enter(builder: Builder) -> Builder:
        TWINS.update(dict.fromkeys(names, builder))
        return builder

    return enter


def copy(theirs: Tensor, ours: Tensor) -> None:
    """Overwrite a PEFT tensor, keeping its dtype. Raises: ValueError where the shapes differ."""
    if theirs.shape != ours.shape:
        raise ValueError(f"PEFT's tensor is {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
    with torch.no_grad():
        theirs.copy_(ours)


@of("lora", "rslora", "dora")
def lora(variant: Any, sites: list[str]) -> Twin:
    import peft

    config = peft.LoraConfig(
        r=variant.r,
        lora_alpha=variant.alpha,
        use_rslora=variant.rslora,
        lora_dropout=variant.dropout,
        use_dora=variant.name == "dora",
        target_modules=sites,
    )

    def load(theirs: Any, ours: Mapping[str, Tensor]) -> None:
        copy(theirs.lora_A[ADAPTER].weight, ours["A"])
        copy(theirs.lora_B[ADAPTER].weight, ours["B"])
        if "m" in ours:
            copy(theirs.lora_magnitude_vector[ADAPTER].weight, ours["m"])

    return Twin(config, load)


@of("pissa")
def pissa(variant: Any, sites: list[str]) -> Twin:
    """Once initialised, PEFT's PiSSA is its LoRA on the residual W − s B₀ A₀."""
    import peft

    config = peft.LoraConfig(
        r=variant.r,
        lora_alpha=variant.s * variant.r,
        lora_dropout=variant.dropout,
        target_modules=sites,
    )

    def load(theirs: Any, ours: Mapping[str, Tensor]) -> None:
        copy(theirs.lora_A[ADAPTER].weight, ours["A"])
        copy(theirs.lora_B[ADAPTER].weight, ours["B"])
        W = theirs.base_layer.weight.detach()
        residual = W - variant.s * (ours["B0"] @ ours["A0"]).detach()
        # A new tensor: the weight itself belongs to the floor and to ours as well.
        theirs.base_layer.weight = nn.Parameter(residual.to(W.dtype), requires_grad=False)

    return Twin(config, load)


@of("oft")
def oft(variant: Any, sites: list[str]) -> Twin | None:
    import peft

    if not variant.exact and variant.terms < 4:
        return None
    config = peft.OFTConfig(
        r=variant.n_blocks or 0,
        oft_block_size=0 if variant.n_blocks else variant.block_size or 32,
        block_share=variant.block_share,
        coft=variant.coft,
        eps=variant.eps,
        use_cayley_neumann=not variant.exact,
        num_cayley_neumann_terms=variant.terms,
        target_modules=sites,
    )
    # PEFT's exact rotation is the transpose of its series.
    sign = -1 if variant.exact else 1
    load = lambda theirs, ours: copy(theirs.oft_R[ADAPTER].weight, sign * ours["q"])
    return Twin(config, load, waits=variant.exact)


@of("adalora")
def adalora(variant: Any, sites: list[str]) -> Twin:
    import peft

    config = peft.AdaLoraConfig(
        init_r=variant.init_r,
        target_r=variant.target_r,
        lora_alpha=variant.alpha,
        tinit=variant.tinit,
        tfinal=variant.tfinal,
        deltaT=variant.delta_t,
        beta1=variant.beta1,
        beta2=variant.beta2,
        orth_reg_weight=variant.orth_reg_weight,
        # Nothing here takes a step; PEFT wants the number.
        total_step=variant.tinit + variant.tfinal + 1,
        target_modules=sites,
    )

    def load(theirs: Any, ours: Mapping[str, Tensor]) -> None:
        copy(theirs.lora_A[ADAPTER], ours["A"])
        copy(theirs.lora_B[ADAPTER], ours["B"])
        copy(theirs.lora_E[ADAPTER], ours["E"][:, None])
        # In other dtypes than float32 PEFT trains the constant that its scale divides by.
        theirs.ranknum[ADAPTER].requires_grad_(False)

    return Twin(config, load)


@of("ia3", "ia3_ff")
def ia3(variant: Any, sites: list[str]) -> Twin:
    import peft

    into = variant.side == "in"
    config = peft.IA3Config(target_modules=sites, feedforward_modules=sites if into else [])

    def load(theirs: Any, ours: Mapping[str, Tensor]) -> None:
        # A row for the inputs, a column for the outputs.
        copy(theirs.ia3_l[ADAPTER], ours["l"][None] if into else ours["l"][:, None])

    return Twin(config, load)


@of("road")
def road(variant: Any, sites: list[str]) -> Twin:
    import peft

    config = peft.RoadConfig(
        variant=f"road_{variant.form}", group_size=variant.group_size, target_modules=sites
    )

    def load(theirs: Any, ours: Mapping[str, Tensor]) -> None:
        copy(theirs.road_theta[ADAPTER], ours["theta"])
        copy(theirs.road_alpha[ADAPTER], ours["alpha"])

    return Twin(config, load)


@of("hra")
def hra(variant: Any, sites: list[str]) -> Twin:
    import peft

    config = peft.HRAConfig(r=variant.r, apply_GS=variant.strict, target_modules=sites)
    return Twin(config, lambda theirs, ours: copy(theirs.hra_u[ADAPTER], ours["U"]))


@of("boft")
def boft(variant: Any, sites: list[str]) -> Twin | None:
    """With more than one level PEFT wants a CUDA extension, and trains one level without it."""
    import peft

    if variant.m > 1:
        return None
    config = peft.BOFTConfig(
        boft_block_size=0 if variant.n_blocks else variant.block_size or 4,
        boft_block_num=variant.n_blocks or 0,
        boft_dropout=variant.dropout,
        target_modules=sites,
    )

    def load(theirs: Any, ours: Mapping[str, Tensor]) -> None:
        P = theirs.boft_R[ADAPTER]
        copy(P, skew(ours["q"].detach(), P.shape[-1]))
        copy(theirs.boft_s[ADAPTER], ours["s"][:, None])

    return Twin(config, load, waits=True)


@of("vera")
def vera(variant: Any, sites: list[str]) -> Twin:
    import peft

    config = peft.VeraConfig(
        r=variant.r,
        projection_prng_key=variant.projection_seed,
        d_initial=variant.d_init,
        vera_dropout=variant.dropout,
        target_modules=sites,
    )

    def load(theirs: Any, ours: Mapping[str, Tensor]) -> None:
        # A layer refers to its model's one pair.
        copy(theirs.vera_A[ADAPTER], ours["A"])
        copy(theirs.vera_B[ADAPTER], ours["B"])
        copy(theirs.vera_lambda_d[ADAPTER], ours["lam_d"])
        copy(theirs.vera_lambda_b[ADAPTER], ours["lam_b"])

    return Twin(config, load)
