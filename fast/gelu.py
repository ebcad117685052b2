"""GELU without the library's error function, which takes longer to compute than x to read."""
import torch
import torch.nn.functional as F


def gelu(x):
    """GELU; by a polynomial where that is faster: compiled for a GPU, in half precision, where
    autograd does not follow (`merged_lora.FusedLoRAMLP` has a backward pass of its own)."""
    compiled = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if compiled and x.is_cuda and x.dtype.itemsize == 2:
        return polynomial_gelu(x)
    return F.gelu(x)


def polynomial_gelu(x):
    """GELU to 1e-6, computed in float32.

    For y, one number of x, the normal distribution below -|y| is a polynomial of t times the bell
    curve (Abramowitz and Stegun, 7.1.26). lora_kernels.py has the same polynomial."""
    y = x.float()
    t = 1 / (1 + 0.23164189 * y.abs())
    tail = 0.5307027145 * t - 0.7265760135
    for coefficient in (0.7107068705, -0.142248368, 0.127414796):
        tail = tail * t + coefficient
    tail = tail * t * torch.exp(-0.5 * y * y)
    return (y * torch.where(y < 0, tail, 1 - tail)).to(x.dtype)
