"""Parameters on devices of several processes: what these must agree on, and what none reads alone.

Each process runs the same program on its own devices. If the programs or the replicas of a tensor
differ, the results are wrong without an error, so ``init`` compares them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from topkast import MismatchError, Support, UnsupportedTensorError
from topkast.adapter import Options, is_traced

Arrays = Mapping[str, jax.Array]


def spans_processes(tree: Any) -> bool:
    """Whether an array lies on devices of several processes."""
    return any(
        isinstance(leaf, jax.Array) and not is_traced(leaf) and not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(tree)
    )


def check_agreement(weights: Arrays, options: Options, mesh: Any) -> None:
    """Raise :class:`topkast.MismatchError` in all processes unless they pass the same arguments.

    Compared are options, names, shapes, dtypes and shardings; and the values of what several
    processes hold, which each of them reads once.
    """
    tensors = [
        (name, leaf.shape, str(leaf.dtype), str(getattr(leaf.sharding, "spec", None)))
        for name, leaf in weights.items()
    ]
    program = zlib.crc32(f"{_describe(options)} {tensors}".encode())
    programs = _gather([dict.fromkeys(mesh.devices.flat, program)], mesh)
    if len({int(values[0]) for values in programs.values()}) > 1:
        raise MismatchError(
            "the processes call init with different options of wrap_optimizer, or with params of "
            "different names, shapes, dtypes or shardings: run the same program in all of them, "
            "with one seed"
        )
    holders = {name: _holders(leaf, mesh) for name, leaf in weights.items()}
    checksums = _gather([_checksums(weights[name], holders[name]) for name in weights], mesh)
    for column, name in enumerate(weights):
        for devices in holders[name].values():
            first, *others = sorted(devices, key=lambda device: device.process_index)
            for other in others:
                if checksums[first][column] != checksums[other][column]:
                    raise MismatchError(
                        f"{name} has other values in process {other.process_index} than in process "
                        f"{first.process_index}, which hold copies of it: start all processes with "
                        "the same weights, made from one seed or restored from one checkpoint"
                    )


class UnreadableSupports(Mapping[str, Support]):
    """The sets of tensors whose indices lie on devices of several processes.

    To read them is an operation of all processes. A process that waits for the others cannot report
    an error, so that reading them raises one instead.
    """

    def __init__(self, names: Iterator[str]) -> None:
        self._names = tuple(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> NoReturn:
        if name not in self._names:
            raise KeyError(name)
        raise UnsupportedTensorError(
            f"the sets of {name} lie on devices of several processes, and process "
            f"{jax.process_index()} reads only its part: in all processes, copy them first by "
            "state, params = jax.device_put((state, params), NamedSharding(mesh, "
            "PartitionSpec())), or call jax.jit(topkast.masks)(state, params)"
        )


def _holders(array: jax.Array, mesh: Any) -> dict[str, list[Any]]:
    """The devices that hold each part of an array, for parts that several processes hold."""
    if array.is_fully_addressable:  # not on the mesh: every process has an array of its own
        holders = {"": [*mesh.devices.flat]}
    else:
        holders = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            holders.setdefault(str(index), []).append(device)
    return {
        index: devices
        for index, devices in holders.items()
        if len({device.process_index for device in devices}) > 1
    }


def _checksums(array: jax.Array, holders: Mapping[str, list[Any]]) -> dict[Any, int]:
    """The checksum of the part that each device of this process holds, unless it alone does."""
    if array.is_fully_addressable:
        parts = dict.fromkeys(holders, array)
    else:
        parts = {str(shard.index): shard.data for shard in array.addressable_shards}
    checksums: dict[Any, int] = {}
    for index in holders.keys() & parts.keys():
        part = np.ascontiguousarray(parts[index]).reshape(-1).view(np.uint8)
        checksums |= dict.fromkeys(holders[index], zlib.crc32(part.data))
    return checksums


def _gather(columns: list[dict[Any, int]], mesh: Any) -> dict[Any, np.ndarray[Any, Any]]:
    """Collect a row of uint32 from each device of a mesh in all processes; missing values are 0."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (mesh.devices.size, len(columns))
    rows = []
    for device in sharding.addressable_devices_indices_map(shape):
        row = np.asarray([[column.get(device, 0) for column in columns]], np.uint32)
        rows.append(jax.device_put(row, device))
    array = jax.make_array_from_single_device_arrays(shape, sharding, rows)
    gathered = np.asarray(jax.device_put(array, NamedSharding(mesh, PartitionSpec())))
    return {
        device: gathered[index[0]][0]
        for device, index in sharding.devices_indices_map(shape).items()
    }


def _describe(value: Any) -> str:
    """Describe options in words that are the same in every process, without addresses."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Mapping):
        return str({str(name): _describe(entry) for name, entry in value.items()})
    if isinstance(value, (tuple, list)):
        return str([_describe(entry) for entry in value])
    name = type(value).__qualname__
    if is_dataclass(value):
        entries = {field.name: _describe(getattr(value, field.name)) for field in fields(value)}
        return f"{name}{entries}"
    return name
