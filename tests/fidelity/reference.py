"""What the fidelity tests share: layers, moved adapters, and the comparison with a dense W'."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

on_layers = pytest.mark.parametrize(
    "d_in, d_out, bias", [(24, 40, True), (24, 40, False), (40, 24, True), (40, 24, False)]
)
in_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def settings(**cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Hyperparameters to try, each under its keyword as the test's id."""
    return pytest.mark.parametrize("hyper", cases.values(), ids=cases)


def linear(
    d_in: int = 24, d_out: int = 40, bias: bool = True, dtype: torch.dtype = torch.float64
) -> nn.Linear:
    """A linear layer, seeded."""
    generator = torch.Generator().manual_seed(10 * d_in + d_out)
    layer = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / d_in**0.5
    return layer.to(dtype)


def adapted(
    variant: str | type[ll.Variant],
    *layer: Any,
    dtype: torch.dtype = torch.float64,
    moved: float = 0.5,
    **hyper: Any,
) -> nn.Linear:
    """`linear(*layer)` under a method, every trained tensor filled with noise of that scale;
    moved=0 leaves the fresh adapter."""
    model = linear(*layer, dtype=dtype)
    ll.attach(model, variant, dtype=dtype, seed=0, **hyper)
    if moved:
        generator = torch.Generator().manual_seed(3)
        for tensor in trained(model).values():
            tensor.data = (torch.randn(tensor.shape, generator=generator) * moved).to(tensor)
    return model


def tensors(model: nn.Linear) -> dict[str, Tensor]:
    """The adapter's tensors by name."""
    return model.adapters["default"].tensors()


def trained(model: nn.Linear) -> dict[str, Tensor]:
    return {key: t for key, t in tensors(model).items() if t.requires_grad}


def inputs(
    d_in: int, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = (2, 3)
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*batch, d_in, generator=generator, dtype=torch.float64).to(dtype)


def updated_weight(model: nn.Linear) -> Tensor:
    """W' by probing: what the layer does to each unit vector, the bias left out."""
    with torch.no_grad():
        eye = torch.eye(model.in_features, dtype=model.weight.dtype)
        return (model(eye) - model(torch.zeros_like(eye[:1]))).T


def rel_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖. Raises: AssertionError for another dtype or shape, or for what is not
    finite, or for a `want` that is all zeros and so tests nothing."""
    assert got.dtype == want.dtype, f"{got.dtype}, not {want.dtype}"
    assert got.shape == want.shape, f"{tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    assert got.isfinite().all() and want.isfinite().all(), "not finite"
    assert want.any(), "the reference is zero"
    return float((got - want).norm() / want.norm())


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-10, what: str = "it") -> None:
    error = rel_error(got, want)
    assert error <= tolerance, f"{what} is off by {error:.1e}, above {tolerance:.0e}"


def assert_follows(
    model: nn.Linear, dense: Callable[..., Tensor], train: set[str], tolerance: float
) -> None:
    """Hold the layer to y = x W'ᵀ + b, W' = dense(W, **tensors) taken in float64: the output, the
    probed W', and by autograd the gradients to x and to every trained tensor.

    train: the names of the tensors that the paper trains.
    """
    dtype = model.weight.dtype
    x = inputs(model.in_features, dtype).requires_grad_()
    y_grad = inputs(model.out_features, dtype).flip(0)
    y = model(x)
    y.backward(y_grad)

    own = {key: t.detach().double() for key, t in tensors(model).items()}
    for key in train:
        own[key].requires_grad_()
    x_ref = x.detach().double().requires_grad_()
    W_new = dense(model.weight.detach().double(), **own)
    y_ref = x_ref @ W_new.T
    if model.bias is not None:
        y_ref = y_ref + model.bias.detach().double()
    y_ref.backward(y_grad.double())

    assert set(trained(model)) == train
    assert all(p.grad is None for p in (model.weight, model.bias) if p is not None)
    assert_close(y, y_ref.to(dtype), tolerance, "the output")
    assert_close(updated_weight(model), W_new.detach().to(dtype), tolerance, "W'")
    assert_close(x.grad, x_ref.grad.to(dtype), tolerance, "the gradient to x")
    for key, tensor in trained(model).items():
        want = own[key].grad.to(dtype)
        assert_close(tensor.grad, want, tolerance, f"the gradient to {key}")


def first_gradients(variant: str | type[ll.Variant], **hyper: Any) -> dict[str, Tensor]:
    """The gradients to the trained tensors of a fresh adapter."""
    model = adapted(variant, moved=0, **hyper)
    model(inputs(24)).square().sum().backward()
    return {key: t.grad for key, t in trained(model).items()}


def assert_starts_as_identity(variant: str | type[ll.Variant], bias: bool, **hyper: Any) -> None:
    """A fresh adapter leaves the output as it is, bit for bit, in every dtype of the model and
    of the adapter."""
    for d_in, d_out in ((24, 40), (40, 24)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for own in {dtype, torch.float32}:
                model = linear(d_in, d_out, bias, dtype=dtype)
                x = inputs(d_in, dtype)
                want = model(x)
                ll.attach(model, variant, dtype=own, seed=0, **hyper)
                assert torch.equal(model(x), want), f"{dtype} with {own} tensors"


with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def singular_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.detach())


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.detach(), rtol=1e-10))


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and not op.is_view:
                self.entries = max(self.entries, made.numel())
        return out


def largest_in_a_step(variant: str | type[ll.Variant], d: int, **hyper: Any) -> int:
    """The entries of the largest tensor that a step on a d × d layer with 4 tokens makes."""
    model = adapted(variant, d, d, **hyper)
    x = inputs(d, batch=(4,)).requires_grad_()
    with Largest() as largest:
        (model(x).square().sum() + ll.regulariser(model)).backward()
    return largest.entries
