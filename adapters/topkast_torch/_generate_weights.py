"""Initial weights of a dense model, generated from a seed."""

from __future__ import annotations

import torch
from torch import nn

from topkast import OptionError
from topkast.adapter import TensorInfo, kept_dense
from topkast.reservoirs import Generated, Init
from topkast_torch._reservoirs import STREAMED, record_origin
from topkast_torch.sparse._products import numpy_name
from topkast_torch.sparse._sparse_layer import layer_of


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
        If the rule is not known, the seed is invalid, or a weight is neither float32 nor float64,
        on the meta device, or that of a sparse layer. Nothing is changed then.

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
    dense = kept_dense(shapes, None)
    origins = {}
    for name, param in params.items():
        if layer_of(param) is not None:
            raise OptionError(
                f"{name} belongs to a sparse layer, which draws its own weights: pass it "
                "reservoir='seeded', init and seed instead"
            )
        if name in dense:
            continue
        if param.dtype not in STREAMED or param.is_meta:
            raise OptionError(
                f"{name} is {param.dtype} on {param.device}: generated weights are float32 or "
                "float64, and need memory"
            )
        rule, dtype = Init.of(init, tuple(param.shape)), numpy_name(param.dtype)
        origins[name] = Generated(name, seed, rule, param.numel(), dtype)
    for name, origin in origins.items():
        weights = torch.from_numpy(origin.read(0, origin.size))
        params[name].copy_(weights.view(params[name].shape))
        record_origin(params[name], origin)
