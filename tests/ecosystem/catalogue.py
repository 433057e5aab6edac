"""Every optimizer of some packages: which the library wraps, and which it refuses and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeAlias

import prodigyopt
import pytorch_optimizer
import schedulefree
import torch
from pytorch_optimizer.optimizer import OPTIMIZERS
from torch import nn

Build: TypeAlias = Callable[[nn.Module], torch.optim.Optimizer]


def every_class() -> dict[str, type]:
    """All classes of optimizers, and of what stands around optimizers, by their names."""
    found = dict(_public("torch.optim", torch.optim))
    found |= _public("schedulefree", schedulefree)
    found |= _public("prodigyopt", prodigyopt)
    found |= _public("pytorch_optimizer", pytorch_optimizer)
    found |= {f"pytorch_optimizer.{one.__name__}": one for one in OPTIMIZERS.values()}
    del found["torch.optim.Optimizer"]
    return found


def _public(package: str, module: ModuleType) -> Iterator[tuple[str, type]]:
    for name, value in vars(module).items():
        if not isinstance(value, type):
            continue
        # Those of schedulefree that stand around an optimizer are no optimizers to PyTorch.
        if issubclass(value, torch.optim.Optimizer) or module is schedulefree:
            yield f"{package}.{name}", value


def _takes_params(name: str, **options: Any) -> Build:
    kind: Any = every_class()[name]
    return lambda model: kind(list(model.parameters()), **options)


def _takes_matrices(name: str) -> Build:
    """Muon and the like, whose groups say what is a matrix."""
    kind: Any = every_class()[name]

    def build(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [param for param in model.parameters() if param.dim() > 1]
        others = [param for param in model.parameters() if param.dim() < 2]
        groups = [
            {"params": matrices, "use_muon": True},
            {"params": others, "use_muon": False},
        ]
        made: torch.optim.Optimizer = kind(groups)
        return made

    return build


def _takes_model(name: str) -> Build:
    kind: Any = every_class()[name]
    return lambda model: kind(model)


def _stands_around(name: str) -> Build:
    kind: Any = every_class()[name]
    return lambda model: kind(torch.optim.SGD(model.parameters(), 0.1))


def _perturbs(name: str) -> Build:
    kind: Any = every_class()[name]
    return lambda model: kind(model.parameters(), torch.optim.SGD, lr=0.1)


def _names(package: str, names: str) -> list[str]:
    return [f"{package}.{name}" for name in names.split()]


# What the library wraps. Fira, GaLore and APOLLO project gradients where a group has a rank, which
# is refused; see test_optimizers.py.
_WRAPPED = [
    *_names(
        "torch.optim",
        "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD",
    ),
    *_names(
        "schedulefree",
        "AdamWScheduleFree AdamWScheduleFreePaper AdamWScheduleFreeReference RAdamScheduleFree "
        "SGDScheduleFree SGDScheduleFreeReference",
    ),
    "prodigyopt.Prodigy",
    *_names(
        "pytorch_optimizer",
        "A2Grad ADOPT APOLLO ASGD AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaGC AdaMax AdaMod "
        "AdaNorm AdaPNM AdaShift AdaSmooth Adai Adam AdamC AdamG AdamMini AdamP AdamS AdamW "
        "AdamWSN Adan AggMo Aida Ano ApolloDQN AvaGrad BCOS DAdaptAdaGrad DAdaptAdam DAdaptAdan "
        "DAdaptLion DAdaptSGD DiffGrad DualAdam EXAdam EmoFact EmoLynx EmoNavi FOCUS FTRL Fira "
        "Fromage GaLore Grams GrokFastAdamW Kate LARS LaProp Lamb Lion MADGRAD MARS MSVAG NAdam "
        "NovoGrad PAdam PID PNM Prodigy QHAdam QHM RAdam RMSprop SGD SGDP SGDW SRMM SWATS "
        "ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD SignSGD SimplifiedAdEMAMix "
        "StableAdamW StableSPAM Tiger VSGD Yogi",
    ),
]
WRAPPED: dict[str, Build] = {
    name: _takes_model(name) if name.endswith("AdamMini") else _takes_params(name)
    for name in _WRAPPED
}

_MATRIX = "does not treat a tensor as a bag of coordinates"
_STEP = "cannot take a plain step"
_HOLDS = "holds another optimizer, SGD, in its attribute"

REFUSED: dict[str, tuple[Build, str]] = {
    "torch.optim.Muon": (
        lambda model: torch.optim.Muon([param for param in model.parameters() if param.dim() > 1]),
        _MATRIX,
    )
}
# They use rows, columns, the norm of a row, or draw anew for each tensor.
REFUSED |= {
    name: (_takes_params(name), _MATRIX)
    for name in (
        "torch.optim.Adafactor",
        *_names(
            "pytorch_optimizer",
            "AdaFactor AdaTAM Adalite Alice Amos CAME Conda DASH FlashAdamW Gravity Kron Nero RACS "
            "ROSE Ranger SCION SCIONLight SGDSaI SM3 SOAP SPlus Shampoo SpectralSphere TAM",
        ),
    )
}
REFUSED["pytorch_optimizer.Ranger21"] = (
    _takes_params("pytorch_optimizer.Ranger21", num_iterations=100),
    _MATRIX,
)
REFUSED |= {
    name: (_takes_matrices(name), _MATRIX)
    for name in _names("pytorch_optimizer", "AdaGO AdaMuon Muon MuonClip NorMuon")
}
# They need a closure, a graph of the gradient, a mask of their own, or single precision.
REFUSED |= {
    name: (_takes_params(name), _STEP)
    for name in (
        *_names("torch.optim", "LBFGS SparseAdam"),
        *_names(
            "schedulefree",
            "AdamWScheduleFreeClosure RAdamScheduleFreeClosure SGDScheduleFreeClosure",
        ),
        *_names("pytorch_optimizer", "AdaHessian AliG FAdam LBFGS SPAM SaRA SophiaH"),
    )
}
REFUSED["pytorch_optimizer.BSAM"] = (
    _takes_params("pytorch_optimizer.BSAM", num_data=100),
    _STEP,
)
# They step each tensor in the backward pass.
REFUSED |= {
    name: (_takes_model(name), _STEP) for name in _names("pytorch_optimizer", "AdaLOMO LOMO")
}
REFUSED |= {
    "pytorch_optimizer.LoRARite": (
        _takes_params("pytorch_optimizer.LoRARite"),
        "did not move a tensor",  # it moves pairs of adapters
    ),
    "pytorch_optimizer.ScalableShampoo": (
        _takes_params("pytorch_optimizer.ScalableShampoo"),
        "keeps pre_conditioner for each tensor",
    ),
    "pytorch_optimizer.Magma": (
        _takes_params("pytorch_optimizer.Magma"),
        "holds another optimizer, AdamW",
    ),
}
REFUSED |= {
    name: (_stands_around(name), _HOLDS)
    for name in _names(
        "pytorch_optimizer", "Lookahead OrthoGrad PCGrad SafeFP16Optimizer ScheduleFreeWrapper TRAC"
    )
}
REFUSED |= {
    name: (_perturbs(name), _HOLDS)
    for name in _names("pytorch_optimizer", "FriendlySAM LookSAM SAM")
}
REFUSED["pytorch_optimizer.WSAM"] = (
    lambda model: pytorch_optimizer.WSAM(model, model.parameters(), torch.optim.SGD, lr=0.1),
    _HOLDS,
)

# No optimizers to PyTorch: there is no adapter for them.
NO_OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    name: _stands_around(name)
    for name in _names("schedulefree", "ScheduleFreeWrapper ScheduleFreeWrapperReference")
}

# What cannot be built here, and why.
NOT_BUILT = {
    "pytorch_optimizer.DeMo": "needs einops and a process group",
    "pytorch_optimizer.DistributedMuon": "needs a process group; as Muon otherwise",
    "pytorch_optimizer.GSAM": "needs a scheduler of its own beside the optimizer; as SAM otherwise",
}

# Where what is kept for a weight starts, if not at zero, as the code of each optimizer has it:
# a number, or at the weight (None).
STARTS: dict[str, dict[str, float | None]] = {
    "torch.optim.ASGD": {"ax": None},  # until t0 the average is the weight
    "torch.optim.Rprop": {"step_size": 0.01},
    "schedulefree.AdamWScheduleFree": {"z": None},
    "schedulefree.AdamWScheduleFreePaper": {"z": None},
    "schedulefree.AdamWScheduleFreeReference": {"x": None, "y": None, "z": None},
    "schedulefree.RAdamScheduleFree": {"z": None},
    "schedulefree.SGDScheduleFree": {"z": None},
    "schedulefree.SGDScheduleFreeReference": {"x": None, "y": None, "z": None},
    "prodigyopt.Prodigy": {"p0": None},
    "pytorch_optimizer.A2Grad": {"x_k": None},
    "pytorch_optimizer.AccSGD": {"momentum_buffer": None},
    "pytorch_optimizer.AdaSmooth": {"prev_param": None},
    "pytorch_optimizer.Adai": {"beta1_prod": 1.0},
    "pytorch_optimizer.DAdaptAdaGrad": {"alpha_k": 1e-6, "x0": None},
    "pytorch_optimizer.DAdaptSGD": {"x0": None, "z": None},
    "pytorch_optimizer.MADGRAD": {"x0": None},
    "pytorch_optimizer.Prodigy": {"p0": None},
    "pytorch_optimizer.SRMM": {"mov_avg_param": None},
    "pytorch_optimizer.ScheduleFreeAdamW": {"z": None},
    "pytorch_optimizer.ScheduleFreeRAdam": {"z": None},
    "pytorch_optimizer.ScheduleFreeSGD": {"z": None},
    "pytorch_optimizer.VSGD": {"bg": 2e-8, "bhg": 6e-7},
    "pytorch_optimizer.Yogi": {"exp_avg": 1e-6, "exp_avg_sq": 1e-6},
}
