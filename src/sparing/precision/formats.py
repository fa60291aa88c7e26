"""Number formats of 8-bit training: what they hold, and rounding to them, to nearest with ties to even."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A signed format. `mantissa` 0 bits: integers, and `smallest` is 1."""

    name: str
    most: float
    """Largest finite magnitude: what a block's largest number is scaled to."""
    mantissa: int
    smallest: float
    """Distance between its numbers around zero (for floating point the smallest denormal)."""
    dtype: torch.dtype | None
    """torch's own type for it, where there is one; otherwise numbers of the format are kept in float32."""

    def round(self, x: Tensor) -> Tensor:
        """float32 -> the nearest numbers of the format, in its type. What does not fit becomes what the format has for that: NaN in e4m3
        (OCP 8-bit floating point specification §5.2), infinity in e5m6; integers have nothing, so their caller looks first."""
        if self.dtype is torch.float8_e4m3fn:
            return x.masked_fill(x.abs() > 464.0, torch.nan).to(self.dtype)  # beyond half a step; torch 2.13's cast clamps it
        if self.dtype is torch.int8:
            return x.round().to(torch.int8)
        # The step between neighbours is 2^(exponent - mantissa), and nowhere finer than the denormals'.
        _, exponent = torch.frexp(x)
        step = power_of_two(exponent - 1 - self.mantissa).clamp(min=self.smallest)
        rounded = torch.where(x.isfinite(), (x / step).round() * step, x)
        return torch.where(rounded.abs() > self.most, rounded.sign() * torch.inf, rounded)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent (int32, -126 to 127; clamped to that) in float32, exactly."""
    return (exponent.clamp(-126, 127).to(torch.int32) + 127 << 23).view(torch.float32)


E4M3 = Format("e4m3", 448.0, 3, 2.0**-9, torch.float8_e4m3fn)
E5M6 = Format("e5m6", 65024.0, 6, 2.0**-20, None)
"""12 bits for the input of the linear after attention (arXiv 2412.19437 §3.3.3); IEEE's bias 15 and infinities, as e5m2 has them."""
INT8 = Format("int8", 127.0, 0, 1.0, torch.int8)
"""Symmetric: -128 is never used, so that a sign can be turned."""
