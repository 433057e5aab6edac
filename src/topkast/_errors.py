"""The library's own errors. Each is also the built-in error that a caller would expect."""


class OptionError(ValueError):
    """An option of :func:`topkast.wrap_optimizer` has a value that it cannot have."""


class NonFiniteError(ValueError):
    """A weight is NaN or infinite, so that it has no rank by magnitude."""


class MismatchError(ValueError):
    """Arrays, names or states that belong together do not fit each other."""


class StateDictError(MismatchError):
    """A state dict is corrupt, or was saved from something else."""


class UnsupportedTensorError(TypeError):
    """A tensor of a kind that the library cannot keep sparse."""


class UnsupportedOptimizerError(TypeError):
    """An optimizer that does not treat a tensor as a bag of coordinates."""


class AdapterNotFoundError(TypeError):
    """No adapter serves the framework of an optimizer."""


class DenseAverageWarning(UserWarning):
    """An average of forward views is made, which has more nonzeros than A."""


class SparseExportWarning(UserWarning):
    """A model with sparse layers is saved in a form that other libraries cannot load."""


class WeightsMovedWarning(UserWarning):
    """Weights are not those that A and B were chosen from: something else changed them."""
