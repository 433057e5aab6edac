"""Initial weights of a dense model, generated from a seed."""

from __future__ import annotations

import torch
from torch import nn

from topkast import OptionError
from topkast.adapter import TensorInfo, kept_dense
from topkast.reservoirs import Generated, Init
from topkast_torch._reservoirs import STREAMED, record_origin


@torch.no_grad()
def generate_weights(model: nn.Module, *, seed: int = 0, init: str | Init = "default") -> None:
    """Give a model initial weights that can be generated again, for ``reservoir="seeded"``.

    Every Parameter that :func:`topkast.wrap_optimizer` sparsifies by default gets new weights, by
    seed, name and index: those with at least two dimensions above one. The others are not changed.

    Parameters
    ----------
    model
        A model, before its optimizer is built.
    seed
        Seed of all weights, an integer of at least 0.
    init
        Rule or :class:`topkast.reservoirs.Init`; see :meth:`topkast.reservoirs.Init.of`.

    Raises
    ------
    OptionError
        If the rule is not known, or a weight is neither float32 nor float64.

    Examples
    --------
    >>> import torch, topkast, topkast_torch
    >>> model = torch.nn.Linear(20, 30)
    >>> topkast_torch.generate_weights(model, seed=1, init="kaiming_normal")
    >>> opt = torch.optim.AdamW(model.named_parameters(), 1e-3)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8, reservoir="seeded")
    >>> topkast.summary(opt).held_parts["reservoir"]
    0
    """
    params = dict(model.named_parameters())
    shapes = {name: TensorInfo(tuple(param.shape), param.dtype) for name, param in params.items()}
    for name in params.keys() - kept_dense(shapes, None):
        param = params[name]
        if param.dtype not in STREAMED:
            raise OptionError(f"{name} is {param.dtype}: generated weights are float32 or float64")
        dtype = str(param.dtype).removeprefix("torch.")
        origin = Generated(name, seed, Init.of(init, tuple(param.shape)), param.numel(), dtype)
        weights = torch.from_numpy(origin.read(0, origin.size))
        param.copy_(weights.view(param.shape))
        record_origin(param, origin)
