"""Holding a layer whose method changes the bias too to y = x W'ᵀ + b'."""

from collections.abc import Callable
from typing import Any

import torch
from reference import assert_close, inputs, tensors, trained, updated_weight
from torch import Tensor, nn


def updated_bias(model: nn.Linear) -> Tensor:
    """b' by probing: what the layer makes of zeros."""
    with torch.no_grad():
        return model(torch.zeros(model.in_features, dtype=model.weight.dtype))


def assert_follows(
    model: nn.Linear, dense: Callable[..., Any], train: set[str], tolerance: float
) -> None:
    """Hold the layer to (W', b') = dense(W, b, **tensors) taken in float64, b zeros where the
    layer has none: the output, the probed W' and b', and by autograd the gradients to x and to
    every trained tensor.

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
    b = torch.zeros(model.out_features) if model.bias is None else model.bias.detach()
    W_new, b_new = dense(model.weight.detach().double(), b.double(), **own)
    y_ref = x_ref @ W_new.T + b_new
    y_ref.backward(y_grad.double())

    assert set(trained(model)) == train
    assert all(p.grad is None for p in (model.weight, model.bias) if p is not None)
    assert_close(y, y_ref.to(dtype), tolerance, "the output")
    assert_close(updated_weight(model), W_new.detach().to(dtype), tolerance, "W'")
    if model.bias is not None:
        assert_close(updated_bias(model), b_new.detach().to(dtype), tolerance, "b'")
    assert_close(x.grad, x_ref.grad.to(dtype), tolerance, "the gradient to x")
    for key, tensor in trained(model).items():
        want = own[key].grad.to(dtype)
        assert_close(tensor.grad, want, tolerance, f"the gradient to {key}")
