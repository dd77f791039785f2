"""The frozen layer as a variant sees it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from lora_lite.ops.svd import SvdMethod, is_randomised, truncated_svd


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32, or as it is where it is wider already or not floating point."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


class Base:
    """A frozen layer, and the adapters attached to it before this one.

    `W(x)` runs the layer beneath this adapter, bias included; everything else speaks of the
    pretrained layer alone, so that a variant's tensors keep their meaning whatever other adapters
    are switched on. A subclass says how one kind of layer is read and written; the first subclass
    whose `accepts` answers True serves the layer.
    """

    site: ClassVar[str]
    kinds: ClassVar[list[type["Base"]]] = []

    d_in: int
    d_out: int

    def __init__(self, layer: nn.Module, below: Callable[..., Any] | None = None) -> None:
        self.layer = layer
        # Not `or`: torch 2.11's dynamo cannot ask a bound method whether it is true.
        self.below = frozen_forward(layer) if below is None else below

    def __init_subclass__(cls) -> None:
        Base.kinds.append(cls)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.below(x, *args, **kwargs)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        raise NotImplementedError

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode, for dropout."""
        return self.layer.training

    @property
    def device(self) -> torch.device:
        """Where the layer computes, also when its weight is offloaded between calls."""
        hook = getattr(self.layer, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or self.layer.weight.device)


class LinearBase(Base):
    """nn.Linear and its subclasses: y = x Wᵀ + b, weight stored (d_out, d_in)."""

    site = "linear"
    transposed: ClassVar[bool] = False

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    @property
    def d_in(self) -> int:
        return self.layer.in_features

    @property
    def d_out(self) -> int:
        return self.layer.out_features

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        return self.layer.bias

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The pretrained matrix. Raises: ValueError where the layer holds no plain float matrix."""
        with _on_hand(self.layer):
            weight = self.layer.weight
            if not weight.is_floating_point():
                raise ValueError(
                    f"has a {weight.dtype} weight, and this needs the float matrix; "
                    "dequantise the layer first or exclude it"
                )
            # An offloaded weight leaves the device with the context.
            weight = weight.detach().clone() if _offloaded(self.layer) else weight.detach()
        return weight.T if self.transposed else weight

    def is_plain(self, x: Tensor) -> bool:
        """Whether W(x) is x Wᵀ + b by this layer's own tensors in x's dtype, and nothing else: no
        adapter beneath, no forward of another kind (quantised, offloaded, sharded), no gradient."""
        layer, weight = self.layer, self.layer.weight
        return (
            self.below == getattr(layer, "frozen", None)
            and layer.instance_forward is None
            and self.reads_plainly(layer.base_class)
            and type(weight) in (Tensor, nn.Parameter)
            and weight.dtype == x.dtype
            and not any(p.requires_grad for p in (weight, layer.bias) if p is not None)
        )

    @classmethod
    def reads_plainly(cls, kind: type[nn.Module]) -> bool:
        """Whether layers of this class have the forward that `is_plain` speaks of."""
        return kind.forward is nn.Linear.forward

    def less_bias(self, z: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """z − b, in z's dtype."""
        return z if self.bias is None else z - self.bias.to(z.dtype)

    def write(self, weight: Float[Tensor, "d_out d_in"], bias: Tensor | None) -> None:
        """Overwrite the layer's own numbers in place, in its own layout and dtype."""
        with torch.no_grad():
            self.layer.weight.copy_(weight.T if self.transposed else weight)
            if bias is not None:
                self.layer.bias.copy_(bias)

    def linear(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """x Wᵀ in W's dtype by the pretrained layer, bias and earlier adapters left out."""
        if self.layer.weight.is_floating_point() and not _offloaded(self.layer):
            return F.linear(x.to(self.layer.weight.dtype), self.weight)
        return self.less_bias(frozen_forward(self.layer)(x))

    def finite_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix in float32 or wider. Raises: ValueError if an entry is NaN or infinite."""
        weight = at_least_float32(self.weight)
        if not torch.isfinite(weight).all():
            raise ValueError(
                "has NaN or infinite weights, and its singular vectors or norms are undefined; "
                "repair the base checkpoint or exclude the layer"
            )
        return weight

    def svd(
        self, r: int, method: SvdMethod = "auto", seed: int = 0
    ) -> tuple[Float[Tensor, "d_out r"], Float[Tensor, " r"], Float[Tensor, "r d_in"]]:
        """The leading r singular triplets U, S, Vᵀ of W, in float32 or wider."""
        return truncated_svd(self.finite_weight(), r, method, seed)

    def candidates(
        self, r: int, method: SvdMethod = "auto"
    ) -> tuple[Float[Tensor, "d_out q"], Float[Tensor, " q"], Float[Tensor, "q d_in"]]:
        """The singular triplets of W among which r are chosen: all, or the 4 r leading ones where
        they are found by the randomised algorithm; computed once per attach."""
        most = min(self.d_in, self.d_out)
        some = is_randomised(method, r, self.d_in, self.d_out) and 4 * r < most
        if (r, method) not in self.decompositions:
            triplets = self.svd(4 * r, "randomised") if some else self.svd(most, "exact")
            self.decompositions[r, method] = triplets
        return self.decompositions[r, method]

    @cached_property
    def decompositions(self) -> dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]]:
        return {}

    def row_norms(self) -> Float[Tensor, " d_out"]:
        """‖w_i‖₂ of each output row, in float32 or wider."""
        return self.finite_weight().square().sum(1).sqrt()

    def fingerprint_rows(self) -> Shaped[Tensor, "rows d_in"]:
        """Four evenly spaced rows, by which a checkpoint knows its base again."""
        rows = torch.linspace(0, self.d_out - 1, min(4, self.d_out)).long()
        return self.weight[rows.to(self.layer.weight.device)]


class Conv1DBase(LinearBase):
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as (d_in, d_out)."""

    transposed = True

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return any(
            c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
            for c in type(layer).__mro__
        )

    @classmethod
    def reads_plainly(cls, kind: type[nn.Module]) -> bool:
        return kind.forward.__module__ == "transformers.pytorch_utils"

    @property
    def d_in(self) -> int:
        return self.layer.weight.shape[0]

    @property
    def d_out(self) -> int:
        return self.layer.weight.shape[1]


class DenseBase(LinearBase):
    """A linear layer's numbers in another precision, for probing a merge away from the model."""

    def __init__(self, W: LinearBase, dtype: torch.dtype) -> None:
        self.layer = W.layer
        self.dense = W.weight.to(dtype)
        self.dense_bias = None if W.bias is None else W.bias.detach().to(dtype)
        self.below = lambda x: F.linear(x, self.dense, self.dense_bias)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return False

    d_in = property(lambda self: self.dense.shape[1])
    d_out = property(lambda self: self.dense.shape[0])
    weight = property(lambda self: self.dense)
    bias = property(lambda self: self.dense_bias)
    training = property(lambda self: False)

    def linear(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return F.linear(x.to(self.dense.dtype), self.dense)


def base_kind(layer: nn.Module, site: str) -> type[Base] | None:
    """The kind of `Base` that reads this layer at this site, if there is one."""
    return next((k for k in Base.kinds if k.site == site and k.accepts(layer)), None)


def frozen_forward(layer: nn.Module) -> Callable[..., Any]:
    """The layer's forward without its adapters."""
    return getattr(layer, "frozen", layer.forward)


def _offloaded(layer: nn.Module) -> bool:
    return hasattr(layer, "_hf_hook") and layer.weight.is_meta


def _on_hand(layer: nn.Module) -> Any:
    """A context in which accelerate has put an offloaded layer's weights on its device."""
    if not _offloaded(layer):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(layer)
