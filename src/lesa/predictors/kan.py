"""B-spline Kolmogorov-Arnold networks (KAN): a learned one-dimensional curve on every edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def bspline_basis(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Evaluate all B-splines of degree `order` by the recursion of Cox and de Boor; zero outside the knots.

    B_{i,0} = 1 on [u_i, u_{i+1}) and
    B_{i,p} = (x - u_i) / (u_{i+p} - u_i) B_{i,p-1} + (u_{i+p+1} - x) / (u_{i+p+1} - u_{i+1}) B_{i+1,p-1}.

    `x` is (..., inputs) and `knots` (inputs, n + order + 1), rising, one line an input; returns (..., inputs, n).
    """
    x = x.unsqueeze(-1)
    basis = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)
    for p in range(1, order + 1):
        rise = (x - knots[:, : -p - 1]) / (knots[:, p:-1] - knots[:, : -p - 1])
        fall = (knots[:, p + 1 :] - x) / (knots[:, p + 1 :] - knots[:, 1:-p])
        basis = rise * basis[..., :-1] + fall * basis[..., 1:]
    return basis


class KANLayer(nn.Module):
    """Map x (..., inputs) to y (..., outputs): y_o = sum_i base_oi silu(x_i) + scale_oi sum_k spline_oik B_k(x_i).

    The knots cut `span` into `grid_size` equal parts and go on by `order` parts on both sides. The splines start as
    least-squares fits to uniform noise, at most `spline_noise` / (2 `grid_size`) in size, and the scales at
    `spline_scale`: a new layer is its base branch, and the curves grow from there. On the `meta` device a layer has
    shapes alone: it takes up numbers that are there already.
    """

    knots: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        grid_size: int = 5,
        order: int = 3,
        span: tuple[float, float] = (-3.0, 3.0),
        spline_noise: float = 0.02,
        spline_scale: float = 0.2,
    ) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("knots", torch.empty(inputs, grid_size + 2 * order + 1))
        self.base = nn.Parameter(torch.empty(outputs, inputs))
        self.spline = nn.Parameter(torch.empty(outputs, inputs, grid_size + order))
        self.scale = nn.Parameter(torch.empty(outputs, inputs))
        if not self.base.is_meta:
            self._start(grid_size, span, spline_noise, spline_scale)

    @torch.no_grad()
    def _start(self, grid_size: int, span: tuple[float, float], spline_noise: float, spline_scale: float) -> None:
        part = (span[1] - span[0]) / grid_size
        self.knots.copy_(span[0] + part * torch.arange(-self.order, grid_size + self.order + 1))
        self.scale.fill_(spline_scale)
        nn.init.kaiming_uniform_(self.base, a=math.sqrt(5))
        noise = (torch.rand(*self.base.shape, grid_size + 1) - 0.5) * spline_noise / grid_size
        self._fit(noise)

    @torch.no_grad()
    def _fit(self, values: Tensor) -> None:
        """Set the splines to the smallest coefficients that pass through `values` at the knots within the span."""
        inner = self.knots[:, self.order : self.knots.shape[1] - self.order]
        basis = bspline_basis(inner.T, self.knots, self.order)[:, 0]
        self.spline.copy_(values @ torch.linalg.pinv(basis).T)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base branch and the splines."""
        basis = bspline_basis(x, self.knots, self.order).flatten(-2)
        splines = (self.spline * self.scale.unsqueeze(-1)).flatten(1)
        return functional.linear(functional.silu(x), self.base) + functional.linear(basis, splines)


class KAN(nn.Sequential):
    """Stack KAN layers of the given `widths`, as [51, 256, 256, 1]; the other arguments are those of `KANLayer`.

    Example:
        >>> KAN([51, 256, 256, 1])(torch.zeros(4, 51)).shape
        torch.Size([4, 1])

    Raises: ValueError if there are fewer than two widths, one of them or `grid_size` or `order` is less than 1, or
        `span` does not rise.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grid_size: int = 5,
        order: int = 3,
        span: tuple[float, float] = (-3.0, 3.0),
        spline_noise: float = 0.02,
        spline_scale: float = 0.2,
    ) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"a KAN has two or more widths, each at least 1, got {list(widths)}; give [inputs, outputs]."
            )
        if grid_size < 1 or order < 1:
            raise ValueError(f"grid_size and order are at least 1, got {grid_size} and {order}; raise them.")
        if not span[0] < span[1]:
            raise ValueError(f"the span of the knots rises, got {span}; swap its ends.")
        layers = (
            KANLayer(inputs, outputs, grid_size, order, span, spline_noise, spline_scale)
            for inputs, outputs in pairwise(widths)
        )
        super().__init__(*layers)
