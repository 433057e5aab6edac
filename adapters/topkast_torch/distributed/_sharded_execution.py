"""Sparse execution of layers whose values are divided among processes by FSDP2."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import MismatchError, OptionError, Support
from topkast.adapter import Migration, Options, change_sets, method_of
from topkast.reservoirs import Reservoir
from topkast_torch._reservoirs import TensorReservoir, keep_weights, take_weights
from topkast_torch.distributed._sharding import (
    Exchange,
    ShardedMigration,
    Sharding,
    is_sharded,
    local_part,
)
from topkast_torch.execution._saved_form import SavedForm
from topkast_torch.execution._sparse_execution import SparseExecution
from topkast_torch.inner._inner_state import Layout, Start, entries_of, map_tree, walk
from topkast_torch.optimizer._ownership import claim

_CHUNK = 1 << 18  # weights outside B that are ranked at a time


class ShardedRefresh(NamedTuple):
    """New sets, equal in all processes; no migration if they are the present ones."""

    support: Support
    migration: Migration | None
    entered_active: Tensor


class ShardedExecution(SparseExecution):
    """One tensor, the weight of a sparse layer that :func:`topkast_torch.fully_shard` has sharded.

    The Parameter of the model is a DTensor. The inner optimizer steps ``values``, the part of this
    process, in the same memory. The reservoir has the rows of the weight that this process holds.
    The sets are equal in all processes; each chooses among the weights that it holds, and only
    counts and changes of the sets pass between them: see ``RankedTensors.refresh_across``.
    """

    param: Any  # the model's Parameter, a DTensor of shape (|B|, 1, …)
    sharding: Sharding

    def _take_over(self, options: Options) -> None:
        layer, name = self.layer, self.ranked.key
        self.param, self.sharding = layer.values, layer.sharding
        self._check(name, options)
        part = local_part(self.param.detach()).view(*self.ranked.compact_shape[:-1], -1)
        self.values = Parameter(part, requires_grad=self.param.requires_grad)
        reservoir: Any = layer.reservoir
        # Loaded from a file, or trained by a method that forgets: there are no weights outside B.
        if reservoir is None or method_of(options).forgets:
            start, stop = self._range
            reservoir = TensorReservoir(part.new_zeros(stop - start))
        rows = reservoir.tensor.to(part)
        if options.reservoir == "host":
            rows = rows.cpu().pin_memory() if rows.is_cuda else rows
        self.reservoir = TensorReservoir(rows, options.reservoir)
        self.saved_form = ShardedForm(self)

    def _check(self, name: str, options: Options) -> None:
        if not is_sharded(self.param):
            raise MismatchError(
                f"the values of {name} are gathered, as after a forward pass: call model.reshard() "
                "before building the optimizer"
            )
        processes, method = self.sharding.count, method_of(options)
        if method.refreshes and not method.takes_largest:
            raise OptionError(
                f"{type(method).__name__} cannot choose the sets of {name}, whose weights are "
                f"sharded over {processes} processes, which choose by magnitudes alone: use the "
                "default method with explore='magnitude', or DistributedDataParallel instead of "
                "fully_shard"
            )
        if options.pattern is not None:
            raise OptionError(
                f"pattern={options.pattern} cannot be combined with {name}, whose weights are "
                f"sharded over {processes} processes: leave it out, or use DistributedDataParallel"
            )
        if options.reservoir not in ("device", "host"):
            raise OptionError(
                f"reservoir={options.reservoir!r} cannot be combined with {name}, of whose weights "
                f"each of {processes} processes keeps its rows: choose 'device' or 'host'"
            )

    @property
    def _range(self) -> tuple[int, int]:
        """The flat indices of the rows that this process holds, as a half-open range."""
        rows, *others = self.layer.weight_shape
        start, stop = self.sharding.bounds(rows)
        return start * math.prod(others), stop * math.prod(others)

    @property
    def held(self) -> Support:
        start, stop = self.sharding.bounds(self.support.backward)
        forward = min(max(self.support.forward - start, 0), stop - start)
        return Support(self.support.indices[start:stop], forward)

    def _connect(self) -> None:
        claim(self.param, self)
        self._sets_version = self.layer.sets_version
        requires_grad = self.param.requires_grad
        self.param.requires_grad_(True)  # a frozen tensor takes no hook, but keeps one
        hook = _RestrictGradient(weakref.ref(self))
        self._hook = self.param.register_post_accumulate_grad_hook(hook)  # which FSDP calls
        self.param.requires_grad_(requires_grad)
        weakref.finalize(self, self._hook.remove)

    def note_replacement(self, param: Tensor, *, is_replaced: bool) -> None:
        pass  # FSDP replaces it in each pass; see accept_external_writes

    @torch.no_grad()
    def accept_external_writes(self, *, thorough: bool = False) -> None:
        name, current = self.ranked.key, self.layer.values
        if is_sharded(current) and current is not self.param:
            raise MismatchError(
                f"the layer of {name} got another Parameter after its optimizer was built: load "
                "state dicts without assign=True, or build and wrap a new optimizer"
            )
        if self.layer.sets_version != self._sets_version:
            raise MismatchError(
                f"the sets of {name} differ from its optimizer's, as after model.load_state_dict: "
                "load the optimizer's state dict too, which holds all sets"
            )
        self._share_memory()

    @torch.no_grad()
    def _share_memory(self) -> None:
        """Let the values have the memory that the model's Parameter has now."""
        part = local_part(self.param.detach())
        if part.data_ptr() != self.values.data_ptr():
            self.values.data = part.view(self.values.shape)

    @torch.no_grad()
    def gather_gradient(self) -> Tensor | None:
        grad = self.param.grad
        return None if grad is None else local_part(grad).reshape(-1)

    def restore_gradient(self) -> None:
        self.values.grad = None

    def count_step(self) -> None:
        if self.param.grad is not None:
            self.steps += 1
            if self.young is not None:
                self.young.count_step()

    def restrict_gradient(self) -> None:
        """Zero the gradient on a resting B∖A."""
        gradient = self.gather_gradient()
        if gradient is not None and not self.step.exploring:
            gradient[self.held.forward_size :].zero_()

    def restrict_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        def restrict(_: Any, entry: Any) -> Any:
            if not is_sharded(entry):
                return entry
            return local_part(entry).reshape(self.values.shape)

        return dict(map_tree(restrict, next(iter(states.values()), {})))

    def gradient_bytes(self) -> int:
        return 0 if self.param.grad is None else local_part(self.param.grad).nbytes

    def choose_sets(self, options: Options, updates: int) -> Any:
        held, old = self.held, self.support
        chosen = self.ranked.refresh_across(
            self.values.detach().view(-1),
            held.indices,
            self._weights_outside,
            options,
            self.sharding.total,
        )
        numbers = torch.arange(held.backward, device=held.indices.device)
        places = 1 + (numbers < held.forward).to(chosen.places.dtype)
        differs = chosen.places != places
        indices = torch.cat([held.indices[differs].long(), chosen.entrants])
        places = torch.cat([chosen.places[differs], chosen.entrant_places])
        changes = self.sharding.gather(4 * indices + places)
        if not len(changes):
            return ShardedRefresh(old, None, self.ranked.no_change(old.indices))
        new = change_sets(old, changes >> 2, changes & 3)
        # On the host: an accelerator would make a table of all weights.
        before, after = (Support(sets.indices.cpu(), sets.forward) for sets in (old, new))
        positions = Migration.between(before, after, self.ranked.size)
        migration = Migration(*(tensor.to(old.indices.device) for tensor in positions))
        entered = migration.entered_forward(old, new).sum(dtype=torch.int32)
        return ShardedRefresh(new, migration, entered.view(1))

    def _weights_outside(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and weights of this process's rows outside B, in pieces."""
        start, stop = self._range
        rows = _tensor_of(self.reservoir)
        device, sets = self.values.device, (self.support.active, self.support.exploring)
        for first in range(start, stop, _CHUNK):
            last = min(first + _CHUNK, stop)
            is_outside = torch.ones(last - first, dtype=torch.bool, device=device)
            for units in sets:
                edges = torch.tensor([first, last], dtype=units.dtype, device=device)
                low, high = torch.searchsorted(units, edges).tolist()
                is_outside[units[low:high].long() - first] = False
            indices = torch.arange(first, last, device=device)[is_outside]
            weights = rows[first - start : last - start].to(device)
            yield indices, weights[is_outside]

    def apply_refresh(
        self, refresh: Any, inner: torch.optim.Optimizer, group: Mapping[str, Any]
    ) -> None:
        self.entered_active = refresh.entered_active
        if refresh.migration is None:
            return
        old, new, migration = self.support, refresh.support, refresh.migration
        values = self.values.detach().view(-1)
        moves = ShardedMigration(self.sharding, migration)
        entrants = (~migration.survives).nonzero().view(-1)
        entering = self._fetch(new, entrants, self.reservoir, values)
        self.is_divided = True
        self._store_leaving(old, migration, values)
        values.copy_(moves.apply(values, entering))
        if self.param.grad is not None:  # the next backward may add to it
            gradient = local_part(self.param.grad)
            gradient.copy_(moves.apply(gradient))
        self._switch_to(new)
        self._migrate_entries(inner, moves)
        if self.young is not None:
            self.young.migrate(moves, group)  # type: ignore[arg-type]
        self.is_divided = False

    def _fetch(self, support: Support, positions: Tensor, rows: Reservoir, like: Tensor) -> Tensor:
        """A part of a vector over B: the weights at `positions` (k,), and zero elsewhere.

        They come from the processes that hold their rows.
        """
        start, stop = self.sharding.bounds(support.backward)
        entries = support.indices.index_select(0, positions).long()
        exchange = Exchange(self.sharding, self._row_owners(entries), positions // self._part_size)
        mine = entries.index_select(0, exchange.sent) - self._range[0]
        part = like.new_zeros(stop - start)
        received = positions.index_select(0, exchange.received) - start
        return part.index_copy_(0, received, exchange(take_weights(rows, mine, like)))

    def _store_leaving(self, old: Support, migration: Migration, values: Tensor) -> None:
        """Send the weights that leave B to the processes that hold their rows."""
        leaves = torch.ones(old.backward, dtype=torch.bool, device=values.device)
        leaves[migration.source[migration.survives].long()] = False
        exchange, entries = self._to_rows(old, leaves.nonzero().view(-1))
        weights = exchange(values.index_select(0, self._sent_positions(exchange, leaves)))
        keep_weights(self.reservoir, entries, weights)

    def _to_rows(self, support: Support, positions: Tensor) -> tuple[Exchange, Tensor]:
        """An exchange from parts of B to rows, and where in this process's rows entries arrive."""
        entries = support.indices.index_select(0, positions).long()
        exchange = Exchange(self.sharding, positions // self._part_size, self._row_owners(entries))
        return exchange, entries.index_select(0, exchange.received) - self._range[0]

    def _sent_positions(self, exchange: Exchange, flags: Tensor) -> Tensor:
        positions = flags.nonzero().view(-1).index_select(0, exchange.sent)
        return positions - self.sharding.bounds(len(flags))[0]

    @property
    def _part_size(self) -> int:
        return self.sharding.part_size(self.support.backward)

    def _row_owners(self, entries: Tensor) -> Tensor:
        """The processes that hold the rows of entries at flat indices (k,)."""
        rows, *others = self.layer.weight_shape
        return entries // (self.sharding.part_size(rows) * max(1, math.prod(others)))

    def _migrate_entries(self, inner: torch.optim.Optimizer, moves: ShardedMigration) -> None:
        layout, values = self.profile.layout, self.values.detach().view(-1)
        for path, entry in walk(entries_of(inner, self.values, layout.stores)):
            if path in layout.specs:
                start = layout.starts[path]
                rows = entry.movedim(layout.specs[path].axis(self.ranked.compact_shape), 0)
                fresh: Any = start
                if isinstance(start, Start):
                    fresh = values.view(-1, *(1 for _ in rows.shape[1:]))
                rows.copy_(moves.apply_rows(rows, fresh))

    def restore(self, support: Support, values: Tensor, reservoir: Reservoir) -> None:
        self._share_memory()
        super().restore(support, values, reservoir)

    def dense_weights(self) -> dict[str, Tensor]:
        """All weights as a DTensor that is divided by rows; called in all processes."""
        ((name, shape),) = self.ranked.shapes.items()
        values, support = self.values.detach().view(-1), self.support
        rows = _tensor_of(self.reservoir).to(values.device, copy=True)
        everywhere = torch.ones(support.backward, dtype=torch.bool, device=values.device)
        exchange, entries = self._to_rows(support, everywhere.nonzero().view(-1))
        sent = values.index_select(0, self._sent_positions(exchange, everywhere))
        rows.index_copy_(0, entries, exchange(sent))
        return {name: self.sharding.wrap(rows.view(-1, *shape[1:]), tuple(shape), 0)}

    def rows_of(self, weight: Tensor) -> tuple[Tensor, int]:
        """A copy of this process's rows of a weight, and how many entries in all are not finite."""
        rows = self.sharding.part_of(weight, 0).reshape(-1).to(self.values.device, copy=True)
        bad_count = torch.count_nonzero(~torch.isfinite(rows)).view(1)
        return rows, int(self.sharding.total(bad_count))

    def values_of(self, rows: Tensor, support: Support) -> Tensor:
        """The values on B that this process holds, from the rows that all processes hold."""
        positions = torch.arange(support.backward, device=rows.device)
        return self._fetch(support, positions, TensorReservoir(rows), rows)


class ShardedForm(SavedForm):
    """Entries of the inner optimizer are saved as DTensors, in the shapes that one process saves.

    Other vectors are saved whole, as the indices are.
    """

    def __init__(self, execution: ShardedExecution) -> None:
        self._sharding = execution.sharding
        self._compact = execution.ranked.compact_shape
        self._execution: Any = weakref.ref(execution)

    def save_entries(self, stores: Any) -> Any:
        return self._map(stores, self._wrap)

    def load_entries(self, stores: Any) -> Any:
        return self._map(stores, self._sharding.part_of)

    def save_vector(self, vector: Tensor) -> Tensor:
        return self._sharding.gather(vector)

    def load_vector(self, vector: Tensor) -> Tensor:
        return self._sharding.part_of(vector, 0)

    def _wrap(self, part: Tensor, axis: int) -> Tensor:
        shape = list(part.shape)
        shape[axis] = self._compact[-1]
        return self._sharding.wrap(part, tuple(shape), axis)

    def _map(self, stores: Any, function: Any) -> Any:
        layout: Layout = self._execution().profile.layout

        def convert(path: Any, entry: Any) -> Any:
            if path not in layout.specs or not isinstance(entry, Tensor):
                return entry
            return function(entry, layout.specs[path].axis(self._compact))

        return map_tree(convert, stores)


def _tensor_of(reservoir: Reservoir) -> Tensor:
    assert isinstance(reservoir, TensorReservoir)
    return reservoir.tensor


@dataclass(frozen=True)
class _RestrictGradient:
    """Hook that zeroes the gradient on a resting B∖A after FSDP has reduced it."""

    owner: weakref.ref[ShardedExecution]

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.restrict_gradient()
