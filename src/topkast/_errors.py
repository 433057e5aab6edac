"""The library's errors and warnings. Each error derives from the built-in one callers expect."""


class OptionError(ValueError):
    """An option of :func:`topkast.wrap_optimizer` has an invalid value."""


class NonFiniteError(ValueError):
    """A weight is NaN or infinite and cannot be ranked by magnitude."""


class MismatchError(ValueError):
    """Arrays, names or states that should belong together do not match."""


class StateDictError(MismatchError):
    """A state dict is corrupt, or was saved from a different object."""


class ReservoirError(OSError):
    """The file of a reservoir cannot be written or read, is damaged, or belongs elsewhere."""


class UnsupportedTensorError(TypeError):
    """A tensor has a type, dtype or layout that the library cannot keep sparse."""


class UnsupportedOptimizerError(TypeError):
    """An optimizer does not treat a tensor as a bag of coordinates."""


class AdapterNotFoundError(TypeError):
    """No installed adapter supports the framework of an optimizer."""


class DenseAverageWarning(UserWarning):
    """An average of forward views has more nonzeros than A."""


class SparseExportWarning(UserWarning):
    """A model with sparse layers is saved in a format that other libraries cannot load."""


class WeightsMovedWarning(UserWarning):
    """Weights changed outside the optimizer since A and B were chosen."""
