"""State dicts of ``torch.distributed.checkpoint``, for sparse layers inside of wrappers of modules.

It names entries without the prefixes of DistributedDataParallel and ``torch.compile``, and adds
these prefixes to Parameters and buffers alone before it loads them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from topkast.adapter import bare_name
from topkast_torch.sparse._sparse_layer import SparseLayer
from topkast_torch.sparse._structure import BLOCK, STRUCTURE

# The name of the wrapped module by that of the wrapper's class, which subclasses share.
_NAMES = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def _notice_wrapper(parent: nn.Module, name: str, module: Any) -> None:
    if any(_NAMES.get(base.__name__) == name for base in type(parent).__mro__):
        parent.register_load_state_dict_pre_hook(_add_prefixes)


def _add_prefixes(wrapper: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Give the entries of sparse layers besides the values the names that these layers look for."""
    for name, layer in wrapper.named_modules():
        if isinstance(layer, SparseLayer):
            for entry in (*STRUCTURE, BLOCK):
                key = f"{prefix}{name}.{entry}"
                short = prefix + bare_name(f"{name}.{entry}")
                if key not in state_dict and short in state_dict:
                    state_dict[key] = state_dict.pop(short)


register_module_module_registration_hook(_notice_wrapper)
