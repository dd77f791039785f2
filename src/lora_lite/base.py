"""The frozen layer as a variant sees it."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from lora_lite.observer import Observer
from lora_lite.ops.svd import SvdMethod, is_randomised, truncated_svd

CHUNK = 1024
"""Rows that are probed at a time."""


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32, or as it is where it is wider already or not floating point."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


class Prompt(NamedTuple):
    """Which of a call's tokens are the prompt's.

    lengths: the prompts' tokens, padding left out, of each example, or one for all. mask: the
    attention mask, which says what tokens count of this call and those in the cache before; None
    for all. seen: tokens in the cache, for where there is no mask; None where it can't say. copies:
    whether each example may stand in the batch several times in a row, as beams do.
    """

    lengths: Int[Tensor, " examples"]
    mask: Any = None
    seen: int | None = 0
    copies: bool = False

    def columns(
        self, h: Float[Tensor, "batch tokens d"], first: int, last: int
    ) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
        """Where each prompt's first and last tokens, n = first + last, stand among those of this
        call, and which of them do. A prompt shorter than n has both halves cut at its middle.

        Raises: ValueError where lengths, mask or cache don't say it.
        """
        batch, tokens = h.shape[:2]
        self.check(batch, tokens)
        n = self.lengths.to(h.device)
        n = n.repeat_interleave(batch // len(n))[:, None]
        short = n < first + last
        p = torch.where(short, torch.clamp(n // 2, max=first), first)
        s = torch.where(short, torch.clamp((n + 1) // 2, max=last), last)
        slot = torch.arange(first + last, device=h.device)
        leads = slot < first
        position = torch.where(leads, slot, n - (first + last) + slot)
        there = torch.where(leads, slot < p, slot >= first + last - s)
        if self.mask is None:
            column = position - self.seen
        else:
            order = self.mask.to(h.device).long().cumsum(1)
            column = torch.searchsorted(order, position + 1) - (order.shape[1] - tokens)
        there = there & (column >= 0) & (column < tokens)
        return column.where(there, 0), there

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError unless lengths, mask and cache are those of such a batch."""
        n = len(self.lengths)
        if not (batch % n == 0 if self.copies or n == 1 else batch == n):
            raise ValueError(
                f"prompt_lengths has {n} lengths, and the batch has {batch} examples; "
                "give one for each, or one for all"
            )
        if self.mask is not None:
            shape = tuple(getattr(self.mask, "shape", ()))
            if len(shape) != 2:
                what = f"{len(shape)} axes" if shape else f"the type {type(self.mask).__name__}"
                raise ValueError(
                    f"attention_mask has {what}, and prompts are found by one of (batch, tokens); "
                    "pass that, and with generate, which makes another of it for a static cache, "
                    "use a dynamic one"
                )
            if shape[0] != batch or shape[1] < tokens:
                raise ValueError(
                    f"attention_mask is {shape}, and the call has {batch} examples of {tokens} "
                    "tokens; give the mask of all tokens, those in the cache too"
                )
        elif self.seen is None:
            raise ValueError(
                "the cache does not say how many tokens it holds; pass attention_mask, that of all "
                "tokens, at each call"
            )


class Base:
    """A frozen layer, and the adapters attached to it before this one.

    `W(x)` runs the layer beneath this adapter, bias included; everything else speaks of the
    pretrained layer alone, so that a variant's tensors keep their meaning whatever other adapters
    are switched on. A subclass says how one kind of layer is read and written; the first subclass
    whose `accepts` answers True serves the layer.
    """

    site: ClassVar[str]
    casts_input: ClassVar[bool] = False
    """Whether the layer's input is cast to the dtype in which it computes."""
    targetable: ClassVar[bool] = True
    """Whether targets may name such a layer; others come along with one that they are tied to."""
    kinds: ClassVar[list[type["Base"]]] = []

    d_in: int
    d_out: int
    prompt: Prompt | None = None
    observer: Observer | None = None
    """In training, of a method that observes its layer's input x and the gradient g of its output.
    An op that reads both in its backward may take it over, and leaves None."""

    def __init__(self, layer: nn.Module, below: Callable[..., Any] | None = None) -> None:
        self.layer = layer
        self.below = below
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __init_subclass__(cls) -> None:
        Base.kinds.append(cls)

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, *self.args, **self.kwargs)

    @property
    def run(self) -> Callable[..., Any]:
        """The layer beneath: the adapter attached before this one, or the frozen layer itself."""
        return frozen_forward(self.layer) if self.below is None else self.below

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
        return torch.device(getattr(hook, "execution_device", None) or self.sample().device)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """x with its numbers dropped at rate p in training; x itself where none are."""
        return F.dropout(x, p) if p and self.training else x

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the layer computes on x, and the tensors of a variant arrive."""
        return x.dtype

    def sizes(self) -> tuple[int, int]:
        """How long the last axes of the layer's input and output are; 0 where it has none."""
        return self.d_in, self.d_out

    def outcome(self, y: Tensor) -> Any:
        """What the layer gives back, for what the variant gave."""
        return y

    def sample(self) -> Tensor:
        """One of the layer's own tensors, for its device and dtype."""
        return self.layer.weight

    def fingerprint_rows(self) -> Shaped[Tensor, "rows columns"]:
        """A few rows of it, by which a checkpoint knows its base again."""
        return a_few(self.sample())

    def probe(self) -> "Base":
        """The layer's numbers away from the model, on which a chain of adapters is run to find
        what it amounts to."""
        raise NotImplementedError

    def found(self, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The numbers (weight, bias) that a probe's layer would have to have to do what `run`, the
        chain on it, does. Raises: ValueError where it can have none."""
        raise NotImplementedError

    def own(self) -> dict[str, Tensor]:
        """A probe's numbers as they are without adapters."""
        raise NotImplementedError

    def write(self, numbers: Mapping[str, Tensor]) -> None:
        """Overwrite the layer's own numbers in place, in its own layout and dtype."""
        with torch.no_grad():
            for key, number in numbers.items():
                getattr(self.layer, key).copy_(number)


class LinearBase(Base):
    """nn.Linear and its subclasses: y = x Wᵀ + b, weight stored (d_out, d_in)."""

    site = "linear"
    casts_input = True
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

    def plain(self, x: Tensor) -> tuple[Float[Tensor, "d_out d_in"], Tensor | None] | None:
        """The matrix and the bias where W(x) is x Wᵀ + b by this layer's own tensors in x's dtype,
        and nothing else; None where there is an adapter beneath, a forward of another kind
        (quantised, offloaded, sharded) or a gradient."""
        layer = self.layer
        if self.below is not None or layer.instance_forward is not None:
            return None
        weight, bias = layer.weight, layer.bias
        if (
            type(weight) not in (Tensor, nn.Parameter)
            or weight.dtype != x.dtype
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or not self.reads_plainly(layer.base_class)
        ):
            return None
        return weight.T if self.transposed else weight, bias

    @classmethod
    def reads_plainly(cls, kind: type[nn.Module]) -> bool:
        """Whether layers of this class have the forward that `plain` speaks of."""
        return kind.forward is nn.Linear.forward

    def less_bias(self, z: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """z − b, in z's dtype."""
        return z if self.bias is None else z - self.bias.to(z.dtype)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        if x.dtype != torch.float64 and autocasting(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype

    def probe(self) -> "DenseBase":
        return DenseBase(self, probe_dtype(self.layer.weight))

    def write(self, numbers: Mapping[str, Tensor]) -> None:
        numbers = dict(numbers)
        if self.transposed:
            numbers["weight"] = numbers["weight"].T
        super().write(numbers)

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
        return a_few(self.weight)


class Conv1DBase(LinearBase):
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as (d_in, d_out)."""

    transposed = True

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return _is_conv1d(layer)

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
    """A linear layer's numbers in another precision."""

    def __init__(self, W: LinearBase, dtype: torch.dtype) -> None:
        super().__init__(W.layer, lambda x: F.linear(x, self.dense, self.dense_bias))
        self.dense = W.weight.to(dtype)
        self.dense_bias = None if W.bias is None else W.bias.detach().to(dtype)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return False

    d_in = property(lambda self: self.dense.shape[1])
    d_out = property(lambda self: self.dense.shape[0])
    weight = property(lambda self: self.dense)
    bias = property(lambda self: self.dense_bias)
    training = property(lambda self: False)

    def plain(self, x: Tensor) -> None:
        return None

    def linear(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return F.linear(x.to(self.dense.dtype), self.dense)

    def own(self) -> dict[str, Tensor]:
        bias = {} if self.dense_bias is None else {"bias": self.dense_bias}
        return {"weight": self.dense, **bias}

    def found(self, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """W' = f(I)ᵀ − f(0), by rows of I, and b' = f(0)."""
        origin = run(self.dense.new_zeros(1, self.d_in))
        rows = []
        for start in range(0, self.d_in, CHUNK):
            eye = self.dense.new_zeros(min(CHUNK, self.d_in - start), self.d_in)
            eye.diagonal(start).fill_(1)
            rows.append(run(eye) - origin)
        if self.bias is not None:
            return {"weight": torch.cat(rows).T, "bias": origin[0]}
        if origin.isfinite().all() and origin.any():
            raise ValueError("needs a bias for the merge; give the layer one of zeros")
        return {"weight": torch.cat(rows).T}


class NormBase(Base):
    """A normalisation over the last axis with a weight: y = weight ⊙ n(x) + bias, or, as in Gemma,
    (1 + weight) ⊙ n(x)."""

    site = "norm"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        weight = layer._parameters.get("weight")
        own = "norm" in type(layer).__name__.lower() and not len(_children(layer))
        by_channel = isinstance(layer, nn.GroupNorm | nn.modules.batchnorm._NormBase)
        return own and not by_channel and weight is not None and weight.ndim == 1

    @property
    def d_in(self) -> int:
        return len(self.layer.weight)

    d_out = d_in

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.layer.weight.dtype

    @property
    def weight(self) -> Float[Tensor, " d_in"]:
        return stationary(self.layer).weight.detach()

    @property
    def bias(self) -> Float[Tensor, " d_in"] | None:
        bias = getattr(self.layer, "bias", None)
        return None if bias is None else bias.detach()

    def fingerprint_rows(self) -> Shaped[Tensor, "1 d_in"]:
        return self.weight[None]

    def with_numbers(self, x: Tensor, **numbers: Tensor) -> Tensor:
        """What the layer gives with these numbers in place of its own, by its own class's forward;
        what adapters beneath add to the frozen layer's output is added to this."""
        y = self.swapped(x, numbers)
        if self.below is None:
            return y
        return self(x) + (y - self.swapped(x, self.own()))

    def swapped(self, x: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        own = self.layer._parameters
        self.layer._parameters = {**own, **numbers}
        try:
            return frozen_forward(self.layer)(x, *self.args, **self.kwargs)
        finally:
            self.layer._parameters = own

    def own(self) -> dict[str, Tensor]:
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def probe(self) -> "NormNumbers":
        return NormNumbers(self)


class NormNumbers(NormBase):
    """A normalisation's numbers alone, as a layer that gives them back: whatever adapters do to the
    output at any x, they do to these."""

    def __init__(self, W: NormBase) -> None:
        dtype = probe_dtype(W.layer.weight)
        self.numbers = torch.stack([t.to(dtype) for t in W.own().values()])
        super().__init__(W.layer, lambda x: self.numbers)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return False

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.numbers.dtype

    def swapped(self, x: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        own = super().own()
        return torch.stack([numbers.get(key, own[key]).to(self.numbers) for key in own])

    def own(self) -> dict[str, Tensor]:
        return dict(zip(super().own(), self.numbers))

    def found(self, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return dict(zip(super().own(), run(self.numbers)))


class EmbeddingBase(Base):
    """A table of d_in vectors of length d_out, looked up by ids: W(ids) = scale · weight[ids].
    Subclasses that do something else, such as counting positions, are left alone."""

    site = "embedding"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        plain = getattr(layer, "base_class", type(layer)).forward is nn.Embedding.forward
        return isinstance(layer, nn.Embedding) and (plain or hasattr(layer, "embed_scale"))

    @property
    def d_in(self) -> int:
        """The table's rows."""
        return self.layer.weight.shape[0]

    @property
    def d_out(self) -> int:
        return self.layer.weight.shape[1]

    @property
    def weight(self) -> Float[Tensor, "d_in d_out"]:
        return stationary(self.layer).weight.detach()

    @property
    def scale(self) -> Tensor | float:
        """What the layer multiplies its rows by (Gemma's √d_out)."""
        scale = getattr(self.layer, "embed_scale", 1.0)
        return scale.to(self.layer.weight.dtype) if isinstance(scale, Tensor) else scale

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.layer.weight.dtype

    def sizes(self) -> tuple[int, int]:
        return 0, self.d_out

    def probe(self) -> "EmbeddingNumbers":
        return EmbeddingNumbers(self)


class EmbeddingNumbers(EmbeddingBase):
    """A table in another precision, looked up without the layer's scale."""

    scale = 1.0

    def __init__(self, W: EmbeddingBase) -> None:
        self.table = W.weight.to(probe_dtype(W.weight))
        super().__init__(W.layer, lambda ids: F.embedding(ids, self.table))

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return False

    weight = property(lambda self: self.table)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.table.dtype

    def own(self) -> dict[str, Tensor]:
        return {"weight": self.table}

    def found(self, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Every row looked up; those that the adapters leave alone keep all their bits."""
        rows = []
        for ids in torch.arange(self.d_in, device=self.table.device).split(CHUNK):
            before, after = self.table[ids], run(ids)
            rows.append(after.where((before != after).any(1, keepdim=True), before))
        return {"weight": torch.cat(rows)}


class TiedEmbeddingBase(EmbeddingBase):
    """An embedding whose weight is that of another, which is adapted: T5's encoder has one of its
    own, the decoder a second."""

    targetable = False


class TiedHeadBase(LinearBase):
    """An output head whose weight is an embedding's: it is adapted with it, by the same tensors,
    and has that table's d_in and d_out."""

    site = "embedding"
    targetable = False

    @property
    def d_in(self) -> int:
        return self.layer.out_features

    @property
    def d_out(self) -> int:
        return self.layer.in_features

    def sizes(self) -> tuple[int, int]:
        return self.d_out, self.d_in


class BlockBase(Base):
    """A block of a model, whose first input and (first) output are hidden states (batch, tokens,
    d): W(x) is the latter, and what else the block returns passes by."""

    site = "block"
    rest: tuple[Any, ...] | None = None

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        inner = (m for m in layer.modules() if m is not layer)
        called = not isinstance(layer, nn.ModuleList | nn.ModuleDict)
        return called and any(isinstance(m, nn.Linear) or _is_conv1d(m) for m in inner)

    @property
    def d_in(self) -> int:
        """As the block says, else as long as its first norm's weight or its first layer's input."""
        if isinstance(size := getattr(self.layer, "hidden_size", None), int):
            return size
        for kind in (NormBase, LinearBase, Conv1DBase):
            for module in self.layer.modules():
                if kind.accepts(module):
                    return kind(module).d_in
        raise ValueError("has no norm and no linear layer to say its width")

    d_out = d_in

    def __call__(self, x: Tensor) -> Tensor:
        out = super().__call__(x)
        if not isinstance(out, tuple):
            return out
        self.rest = out[1:]
        return out[0]

    def outcome(self, y: Tensor) -> Any:
        return y if self.rest is None else (y, *self.rest)

    def sample(self) -> Tensor:
        return next(self.layer.parameters())

    def fingerprint_rows(self) -> Shaped[Tensor, "rows columns"]:
        linear = next(m for m in self.layer.modules() if isinstance(m, nn.Linear) or _is_conv1d(m))
        return linear.weight[:1]


def base_kind(layer: nn.Module, site: str, targetable: bool = True) -> type[Base] | None:
    """The kind of `Base` that reads this layer at this site, if there is one: the kind for layers
    that targets may name, or the kind for what comes along."""
    kinds = [k for k in Base.kinds if (k.site, k.targetable) == (site, targetable)]
    return next((kind for kind in kinds if kind.accepts(layer)), None)


def frozen_forward(layer: nn.Module) -> Callable[..., Any]:
    """The layer's forward without its adapters."""
    return getattr(layer, "frozen", layer.forward)


def a_few(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "few ..."]:
    """At most four of them, spread evenly."""
    return rows[torch.linspace(0, len(rows) - 1, min(4, len(rows))).long().to(rows.device)]


def probe_dtype(weight: Tensor) -> torch.dtype:
    """float64 for weights of float32 and wider, float32 for narrower ones."""
    wide = weight.dtype in (torch.float32, torch.float64)
    return torch.float64 if wide else torch.float32


def autocasting(kind: str) -> bool:
    """Whether autocast is on for a kind of device; "meta" has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _children(layer: nn.Module) -> list[str]:
    return [name for name in layer._modules if name != "adapters"]


def _is_conv1d(layer: nn.Module) -> bool:
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(layer).__mro__
    )


def _offloaded(layer: nn.Module) -> bool:
    return hasattr(layer, "_hf_hook") and layer.weight.is_meta


def stationary(layer: nn.Module) -> nn.Module:
    """The layer. Raises: ValueError where accelerate keeps its weights elsewhere between calls."""
    if _offloaded(layer):
        raise ValueError(
            "is offloaded between calls, and its numbers are wanted before each; keep it on a "
            "device in the device map, or leave it out by `exclude`"
        )
    return layer


def _on_hand(layer: nn.Module) -> Any:
    """A context in which accelerate has put an offloaded layer's weights on its device."""
    if not _offloaded(layer):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(layer)
