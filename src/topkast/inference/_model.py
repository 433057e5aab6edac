"""A model from a file of A: its layers by name, and all of them in a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from topkast._errors import MismatchError
from topkast.inference._format import FileContents, check_entries, read_file
from topkast.inference._functions import make_function, read_pair, relu
from topkast.inference._layers import BatchNorm, Chain, Convolution, Layer, Linear
from topkast.inference._weights import Array, Weight, make_weight

_NUMPY = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


class Model(Mapping[str, Layer]):
    """Layers by name, made by :func:`load`; several threads may call them at the same time.

    ``model[name]`` is a layer, a function of one array. If the saved model was a
    ``torch.nn.Sequential`` of known layers, ``model(x)`` calls all of them.

    Attributes
    ----------
    sequence
        The names of the layers in the order of their calls, or None: then compose the layers
        yourself.
    arrays
        The model's other tensors by name, such as embeddings.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        sequence: Sequence[str] | None,
        arrays: Mapping[str, Array],
    ) -> None:
        self._layers, self.arrays = dict(layers), dict(arrays)
        self.sequence = None if sequence is None else tuple(sequence)
        self._steps = _join([self._layers[name] for name in self.sequence or ()])

    def __getitem__(self, name: str) -> Layer:
        try:
            return self._layers[name]
        except KeyError:
            known = ", ".join(map(repr, self._layers))
            raise KeyError(f"the model has no layer {name!r}, only {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(self, x: Array, /) -> Array:
        """What the last layer returns; each gets what the one before it returned.

        The shape is as in PyTorch, the dtype is that of the weights.

        Raises :class:`topkast.MismatchError` if the saved model was no such sequence, or the input
        does not fit the first layer.
        """
        if self.sequence is None:
            raise MismatchError(
                "the saved model was not a torch.nn.Sequential of layers without hooks that "
                "topkast.inference knows: call its layers by name, such as "
                f"model[{next(iter(self), 'name')!r}](x)"
            )
        for step in self._steps:
            x = step(x)
        return x

    @property
    def nbytes(self) -> int:
        """Bytes that weights, indices, layouts and other arrays hold."""
        layers = {id(layer): getattr(layer, "nbytes", 0) for layer in self._layers.values()}
        return sum(layers.values()) + sum(array.nbytes for array in self.arrays.values())


def load(path: str | PathLike[str], /) -> Model:
    """Load a file of :func:`topkast_torch.save_forward` for inference on NumPy arrays.

    Linear layers and convolutions multiply A alone, by the kernels that sparse layers use in
    PyTorch; units of 2, 4 or 8 rows are found in the indices. Linear layers that were saved dense
    are NumPy's products. Nothing imports PyTorch; if it is loaded already, its threads are used.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    Model
        Its layers are those of the types ``Linear``, ``Conv2d`` (zero padding), ``BatchNorm1d``,
        ``BatchNorm2d``, ``ReLU``, ``Tanh``, ``Sigmoid``, ``Flatten``, ``MaxPool2d``,
        ``AdaptiveAvgPool2d(1)``, ``Identity`` and ``Dropout``, as in evaluation.

    Raises
    ------
    MismatchError
        If the file is damaged, was not written by :func:`topkast_torch.save_forward`, or has layers
        of another dtype than float32 and float64.
    ModuleNotFoundError
        If numba or safetensors is not installed.

    Examples
    --------
    >>> import tempfile, numpy as np, torch, topkast_torch, topkast.inference
    >>> net = torch.nn.Sequential(
    ...     topkast_torch.SparseLinear(20, 30, fwd=0.9, bwd=0.8),
    ...     torch.nn.ReLU(), torch.nn.Linear(30, 5))
    >>> with tempfile.NamedTemporaryFile() as file:  # with PyTorch, once
    ...     topkast_torch.save_forward(net, file.name)
    ...     model = topkast.inference.load(file.name)  # without
    >>> x = np.ones((4, 20), np.float32)
    >>> model(x).shape, list(model), model["0"].active
    ((4, 5), ['0', '1', '2'], 60)
    >>> np.allclose(model(x), net(torch.from_numpy(x)).detach().numpy(), atol=1e-6)
    True
    """
    return read_file(path, "np", _make_model)


def _make_model(file: Any, contents: FileContents) -> Model:
    names = list(file.keys())
    for name in names:
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _NUMPY:
            raise MismatchError(
                f"{name} has dtype {dtype}, which NumPy does not have: save model.float()"
            )
    tensors: dict[str, Any] = {name: file.get_tensor(name) for name in names}
    for name, shape in contents.shapes.items():
        values, indices = tensors.pop(name + ".values"), tensors.pop(name + ".indices")
        check_entries(name, shape, values.shape, indices)
        tensors[name] = _Entries(shape, indices, values)
    for name, saved in contents.same.items():
        tensors[name] = tensors[saved]
    used: set[str] = set()
    layers: dict[str, Layer] = {}
    made: dict[Any, Layer] = {}  # by its tensors: layers that share all of them are one object
    for name, description in contents.layers.items():
        prefix = f"{name}." if name else ""
        own = {key: tensors.get(prefix + key) for key in ("weight", "bias", *_STATISTICS)}
        used.update(prefix + key for key in own)
        key = repr(description), *(id(tensor) for tensor in own.values())
        own |= {key: _dense(entry) for key, entry in own.items() if key != "weight"}
        if own["weight"] is None or key not in made:
            made[key] = _make_layer(name or "model", description, own)
        layers[name] = made[key]
    arrays = {name: _dense(entry) for name, entry in tensors.items() if name not in used}
    return Model(layers, contents.sequence, arrays)


_ANY_AXES = 2, 3, 4  # of a batch norm in a file that does not say which it takes
_STATISTICS = "running_mean", "running_var", "num_batches_tracked"


class _Entries:
    """A sparse tensor of the file."""

    def __init__(self, shape: tuple[int, ...], indices: Array, values: Array) -> None:
        self.shape, self.indices, self.values = shape, indices, values

    def to_dense(self) -> Array:
        dense = np.zeros(self.shape, self.values.dtype)
        dense.reshape(-1)[self.indices] = self.values
        return dense


def _dense(entry: Any) -> Any:
    return entry.to_dense() if isinstance(entry, _Entries) else entry


def _make_layer(name: str, description: Mapping[str, Any], tensors: Mapping[str, Any]) -> Layer:
    function = make_function(name, description)
    if function is not None:
        return function
    weight, bias = tensors["weight"], tensors["bias"]
    layer_type = description["type"]
    if layer_type == "Linear":
        _check_axes(name, weight, 2)
        return Linear(name, _read_weight(name, weight), bias)
    if layer_type == "Conv2d":
        _check_axes(name, weight, 4)
        stride, dilation = (
            read_pair(name, description[option]) for option in ("stride", "dilation")
        )
        vertical, horizontal = description["padding"]
        margins = read_pair(name, vertical, min=0), read_pair(name, horizontal, min=0)
        groups = description["groups"]
        if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
            raise ValueError(
                f"the groups of the layer {name} must divide {weight.shape[0]} channels, got "
                f"{groups!r}"
            )
        if isinstance(weight, np.ndarray):
            flat = np.arange(weight.size, dtype=np.int32)
            weight = _Entries(weight.shape, flat, weight.reshape(-1))
        entries = _read_weight(name, weight, groups=groups)
        assert isinstance(entries, Weight)
        return Convolution(
            name, entries, bias, stride=stride, margins=margins, dilation=dilation, groups=groups
        )
    if layer_type == "BatchNorm":
        mean, variance = tensors["running_mean"], tensors["running_var"]
        if mean is None or variance is None:
            raise ValueError(f"the layer {name} needs running_mean and running_var")
        epsilon, axes = float(description["epsilon"]), description.get("axes", _ANY_AXES)
        return BatchNorm(name, mean, variance, _dense(weight), bias, epsilon, axes)
    raise ValueError(
        f"the layer {name} has the type {layer_type!r}, which this version does not know"
    )


def _read_weight(name: str, weight: Any, groups: int = 1) -> Weight | Array:
    if isinstance(weight, _Entries):
        shape, indices, values = weight.shape, weight.indices, weight.values
        return make_weight(f"{name}.weight", shape, indices, values, groups=groups)
    dense: Array = weight
    if dense.dtype not in (np.float32, np.float64):
        raise MismatchError(
            f"{name}.weight has dtype {dense.dtype}, but layers need float32 or float64: save "
            "model.float()"
        )
    return dense


def _check_axes(name: str, weight: Any, axes: int) -> None:
    if weight is None or len(weight.shape) != axes:
        shape = None if weight is None else weight.shape
        raise ValueError(f"the layer {name} needs a weight with {axes} axes, got {shape}")


def _join(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, with each run of sparse linear layers and the ReLUs after them as one chain."""
    steps: list[Layer] = []
    run: list[Linear] = []
    rectifies: list[bool] = []

    def end_run() -> None:
        if len(run) > 1 or any(rectifies):
            steps.append(Chain(run, rectifies))
        else:
            steps.extend(run)
        run.clear()
        rectifies.clear()

    for layer in layers:
        if isinstance(layer, Linear) and layer.is_sparse:
            if run and not run[-1].joins(layer):
                end_run()
            run.append(layer)
            rectifies.append(False)
        elif layer is relu and run:
            rectifies[-1] = True
        else:
            end_run()
            steps.append(layer)
    end_run()
    return steps
