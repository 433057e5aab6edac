"""The interface that adapters are built on, those of this project and of others.

An adapter connects one framework's optimizers to the algorithm. It is a module with a function
``wrap(optimizer, options)``, registered in the entry-point group ``topkast.adapters`` under the
package of the optimizers. The functions ``sparsify(model, optimizer, ...)``, ``densify(model)`` and
``measure_layers(model, example)`` are optional. The adapter holds the state and converts
containers; this interface decides.

- :class:`Options` validates the options and applies the overrides of each tensor.
- :class:`RankedTensors` selects and refreshes the sets of tensors that share one compact vector.
- :class:`Step` describes one update of one tensor (:func:`decide`, :func:`is_due`).
- :class:`Inspection` is the result of ``__topkast_inspect__``, which :func:`topkast.summary` reads.
- :class:`Layer` describes a tensor of a model to :func:`topkast.cost`.
- :func:`read_file` and :func:`check_entries` read files of the forward set.
- :func:`name_extra` makes the error of a missing package name the extra that installs it.
- :class:`Backend` adds operations that the array-API standard lacks, for one array library.
- :func:`check_permutation`, :func:`check_joint` and :func:`observe` probe the inner optimizer.
"""

from topkast._adapters import name_extra
from topkast._age import SETTLED, Betas, corrections, grow, kappa, settled_ages, young_limit
from topkast._inspect import Inspection
from topkast._method import Method
from topkast._options import (
    FIXED_OPTIONS,
    GROUP_OPTIONS,
    Options,
    check_block,
    check_sparsities,
)
from topkast._patterns import check_patterns, kept_dense, matches
from topkast._primitives import Array, cond, is_traced, possibly_true
from topkast._probe import (
    HostArray,
    HostArrays,
    Traits,
    beta_pairs,
    check_joint,
    check_permutation,
    observe,
)
from topkast._step import Step, decide, is_due, noise_key
from topkast._table import format_table
from topkast._tensors import (
    IncrementalRefresh,
    PreparedRefresh,
    RankedTensors,
    Refresh,
    members,
    rank_tensors,
)
from topkast.analysis import Layer
from topkast.backends import Backend, Ranks, threshold_finder
from topkast.backends._compiled import has_numba
from topkast.functional._arrays import apply_updates
from topkast.functional._plan import Plan, TensorInfo, check_any
from topkast.functional._rules import bias_correction, learning_rate
from topkast.functional._state import Arrays, TopKASTState, count_bytes, forward_views, inspection
from topkast.functional._transform import TopKASTTransform
from topkast.functional._wrapped_rule import WrappedRule
from topkast.inference._format import (
    FILE_FORMAT,
    MAX_ENTRIES_PER_VALUE,
    FileContents,
    check_entries,
    import_safetensors,
    read_file,
)
from topkast.methods._chosen import method_of
from topkast.selection._across import change_sets
from topkast.selection._distribution import Shape, exact_fraction, kept_count
from topkast.selection._groups import group_size_of, pattern_densities
from topkast.selection._incremental import choose_first, choose_next
from topkast.selection._random import bare_name
from topkast.selection._ranking import IncrementalSelection
from topkast.selection._support import Migration

__all__ = [
    "FILE_FORMAT",
    "FIXED_OPTIONS",
    "GROUP_OPTIONS",
    "MAX_ENTRIES_PER_VALUE",
    "SETTLED",
    "Array",
    "Arrays",
    "Backend",
    "Betas",
    "FileContents",
    "HostArray",
    "HostArrays",
    "IncrementalRefresh",
    "IncrementalSelection",
    "Inspection",
    "Layer",
    "Method",
    "Migration",
    "Options",
    "Plan",
    "PreparedRefresh",
    "RankedTensors",
    "Ranks",
    "Refresh",
    "Shape",
    "Step",
    "TensorInfo",
    "TopKASTState",
    "TopKASTTransform",
    "Traits",
    "WrappedRule",
    "apply_updates",
    "bare_name",
    "beta_pairs",
    "bias_correction",
    "change_sets",
    "check_any",
    "check_block",
    "check_entries",
    "check_joint",
    "check_patterns",
    "check_permutation",
    "check_sparsities",
    "choose_first",
    "choose_next",
    "cond",
    "corrections",
    "count_bytes",
    "decide",
    "exact_fraction",
    "format_table",
    "forward_views",
    "group_size_of",
    "grow",
    "has_numba",
    "import_safetensors",
    "inspection",
    "is_due",
    "is_traced",
    "kappa",
    "kept_count",
    "kept_dense",
    "learning_rate",
    "matches",
    "members",
    "method_of",
    "name_extra",
    "noise_key",
    "observe",
    "pattern_densities",
    "possibly_true",
    "rank_tensors",
    "read_file",
    "settled_ages",
    "threshold_finder",
    "young_limit",
]
