from __future__ import annotations

import torch
from torch import Tensor


def times_of(scheduler) -> Tensor:
    sig = getattr(scheduler, "sigmas", None)
    n = len(scheduler.timesteps)
    if sig is None:
        a = scheduler.alphas_cumprod.double()
        t = torch.as_tensor(scheduler.timesteps).long().cpu()
        s = ((1 - a[t]) / a[t]).sqrt()
        s = torch.cat([s, torch.zeros(1, dtype=torch.float64)])
        return s / (1 + s)
    sig = torch.as_tensor(sig).double().cpu()
    flow = float(sig.max()) <= 1.0 and (
        "flow" in type(scheduler).__name__.lower()
        or getattr(scheduler.config, "prediction_type", "") == "flow_prediction"
        or getattr(scheduler.config, "use_flow_sigmas", False)
    )
    if len(sig) != n + 1:
        sig = torch.cat([sig, torch.zeros(max(0, n + 1 - len(sig)), dtype=torch.float64)])[: n + 1]
    return sig if flow else sig / (1 + sig)
