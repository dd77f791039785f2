"""Row scales that keep a weight's total energy E = Σ ‖w_i‖²."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.ops.launch import kernels, ops_serve
from lora_lite.ops.one_op import once_differentiable, one_op


def oer_softmax(
    g: Float[Tensor, " n"], norms: Float[Tensor, " n"], temperature: float | Float[Tensor, ""]
) -> Float[Tensor, " n"]:
    """s − 1 for s_i² = p_i/p⁰_i, p⁰ = ‖w_i‖²/E and p = softmax(log p⁰ + g/T).

    Σ (s_i ‖w_i‖)² = E for every g and T, and g = 0 gives exact zeros. Rows without energy keep
    s = 1 and stay out of the softmax.
    """
    if has_kernel(g) and not isinstance(temperature, Tensor):
        return _oer(g, norms, temperature)
    # Finite, so that a layer of zeros gives no NaN.
    log_energy = (2 * norms.log()).clamp(min=-1e30)
    gain = torch.logsumexp(log_energy + g / temperature, 0) - torch.logsumexp(log_energy, 0)
    return torch.where(norms > 0, torch.expm1((g / temperature - gain) / 2), 0)


def ecd_tanh(
    g: Float[Tensor, " n"],
    norms: Float[Tensor, " n"],
    temperature: float | Float[Tensor, ""],
    alpha: float,
) -> Float[Tensor, " n"]:
    """s − 1 for s_i = a_i √(E / Σ ‖w_j‖² a_j²), a = 1 + α tanh(g/T).

    Σ (s_i ‖w_i‖)² = E for every g and T, and g = 0 gives exact zeros.
    """
    a = 1 + alpha * torch.tanh(g / temperature)
    tiny = torch.finfo(norms.dtype).tiny  # E = 0, a layer of zeros, gives no NaN
    E, E_a = norms.square().sum() + tiny, (norms * a).square().sum() + tiny
    return a * (E / E_a).sqrt() - 1


def has_kernel(g: Tensor) -> bool:
    """Whether the kernel serves g: one program holds it."""
    return ops_serve(g) and g.dtype == torch.float32 and g.numel() <= 2**16


class _OER(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, norms: Tensor, temperature: float) -> Tensor:
        s_1, p = kernels("energy").oer_softmax(g, norms, temperature)
        ctx.save_for_backward(s_1, p)
        ctx.temperature = temperature
        return s_1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor, None, None]:
        dg = kernels("energy").oer_softmax_backward(ds, *ctx.saved_tensors, ctx.temperature)
        return dg, None, None


_oer = one_op(_OER)
