"""The closed-form fit of one shortcut: weighted ridge regression, then the best map of a rank."""

import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.shortcuts.maps import LinearShortcut, Rank
from dynadepth.shortcuts.moments import Moments

__all__ = ["explained_variance", "fit_shortcut"]


def fit_shortcut(
    moments: Moments, *, rank: Rank, ridge: float, dtype: torch.dtype = torch.float32
) -> LinearShortcut:
    """Fit the map of a layer's update on its input.

    W = (H + ridge * t * I)^-1 C of the centred moments H of h and C of h and u, with t the mean of H's diagonal; the
    bias is not penalised. Of this map the part of the given rank is kept that changes the fitted updates least: that
    along the first eigenvectors V of W^T H W, so A = W V and B = V^T.

    Args:
        moments: The moments of the layer.
        rank: The rank, at most the width of the states; 0: the bias alone; "full": all of W.
        ridge: The ridge, as a fraction of the mean variance of h; more than 0.
        dtype: That of the map.

    Returns:
        The map, on the device of the moments.

    Raises:
        ConfigError: The rank or the ridge is out of range, or there are no tokens.

    Source:
        Reduced-rank regression: Izenman, J. Multivar. Anal. 5 (1975), with the data's own metric.

    Complexity:
        O(hidden^3), once for each layer.
    """
    width = moments.hh.shape[0]
    if rank != "full" and not 0 <= rank <= width:
        raise ConfigError(
            f"rank is {rank}; expected 0 to {width}, the width of the states, or 'full'"
        )
    if not 0 < ridge < float("inf"):
        raise ConfigError(f"ridge is {ridge}; expected more than 0")
    mean_h, mean_u, hh, hu, _ = moments.centred()
    if rank == 0:
        return LinearShortcut(None, None, mean_u.to(dtype))
    # Where states hardly vary, the moments around their mean are rounding (of float32), which must not be inverted.
    rounding = 10 * torch.finfo(torch.float32).eps * moments.hh.diagonal().mean()
    penalty = torch.maximum(ridge * hh.diagonal().mean(), rounding)
    whole = torch.linalg.solve(hh + penalty * torch.eye(width).to(hh), hu)
    bias = mean_u - mean_h @ whole
    if rank == "full":
        return LinearShortcut(whole.to(dtype), None, bias.to(dtype))
    _, vectors = torch.linalg.eigh(whole.T @ hh @ whole)
    kept = vectors[:, vectors.shape[1] - rank :].flip(1)
    # The sign of an eigenvector is arbitrary; the largest entry decides it, so that fits are reproducible.
    largest = kept.gather(0, kept.abs().argmax(dim=0, keepdim=True))
    kept = kept * largest.sign()
    down = whole @ kept
    bias = mean_u - mean_h @ down @ kept.T
    return LinearShortcut(down.to(dtype), kept.T.to(dtype).contiguous(), bias.to(dtype))


def explained_variance(shortcut: LinearShortcut, moments: Moments) -> float:
    """Return the share of a layer's update that a map explains, on the tokens of some moments.

    Args:
        shortcut: The map.
        moments: Of tokens that need not have fitted it.

    Returns:
        1 minus the map's squared error over that of the mean update; at most 1, and negative for a map that does worse.

    Raises:
        ConfigError: There are no tokens.
    """
    mean_h, mean_u, hh, hu, uu = moments.centred()
    whole = _matrix(shortcut, hh)
    bias = shortcut.b.to(hh) - (mean_u - mean_h @ whole)
    error = uu - 2 * (whole * hu).sum() + (whole * (hh @ whole)).sum()
    error = error + moments.weight * bias.square().sum()
    return float(1 - error / uu) if float(uu) > 0 else 0.0


def _matrix(shortcut: LinearShortcut, like: Tensor) -> Tensor:
    if shortcut.A is None:
        return torch.zeros_like(like)
    whole = shortcut.A.to(like)
    return whole if shortcut.B is None else whole @ shortcut.B.to(like)
