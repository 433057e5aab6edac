"""The cost of importing, the documented names, and the structure of the packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import topkast
import topkast.analysis
import topkast.inference
import topkast.plot
import topkast.reference
import topkast.testing

FRAMEWORKS = [
    "torch",
    "jax",
    "optax",
    "cupy",
    "sklearn",
    "scipy",
    "matplotlib",
    "hypothesis",
    "tqdm",
]


def modules_after(code: str) -> set[str]:
    """Root packages imported by `code` in a fresh interpreter."""
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return {name.partition(".")[0] for name in printed.split()}


def test_importing_the_package_imports_no_framework() -> None:
    assert not modules_after("import topkast, topkast.analysis").intersection(FRAMEWORKS)


def test_figures_import_matplotlib_where_they_are_drawn() -> None:
    assert "matplotlib" in modules_after("import topkast; topkast.plot.masks")
    assert "matplotlib" in modules_after("import topkast.plot")
    modules_after("import topkast.plot, sys; assert 'matplotlib.pyplot' not in sys.modules")


def test_training_numpy_arrays_imports_no_framework() -> None:
    code = """
import numpy as np, topkast
tx = topkast.wrap_optimizer(topkast.AdamW(1e-2), fwd=0.9, bwd=0.8, refresh_every=1)
params = {"w": np.random.default_rng(0).standard_normal((9, 9))}
state = tx.init(params)
updates, state = tx.update({"w": params["w"]}, state, params)
topkast.forward_params(topkast.apply_updates(params, updates), state)
"""
    assert not modules_after(code).intersection(FRAMEWORKS)


def test_wrapping_for_one_framework_imports_no_other() -> None:
    code = "import torch, topkast; p = torch.nn.Parameter(torch.ones(2, 2))\n"
    code += "topkast.wrap_optimizer(torch.optim.SGD([p], 0.1), fwd=0.5, bwd=0.5)"
    assert not modules_after(code).intersection(["jax", "optax", "cupy"])
    code = "import optax, topkast; topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.5, bwd=0.5)"
    assert not modules_after(code).intersection(["torch", "flax", "cupy"])


def test_kernels_are_compiled_only_where_a_sparse_layer_runs() -> None:
    code = "import torch, topkast, topkast_torch\n"
    code += "layer = topkast_torch.SparseLinear(4, 4, fwd=0.5, bwd=0.5)\n"
    assert "numba" not in modules_after(code)
    assert "numba" in modules_after(code + "layer(torch.ones(1, 4))")


def test_importing_costs_only_what_the_project_declares() -> None:
    plain = modules_after("import numpy, array_api_compat, importlib.metadata, decimal, fractions")
    extra = modules_after("import topkast") - plain
    assert {name for name in extra if name not in sys.stdlib_module_names} == {"topkast"}


def test_public_names_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    modules = (
        topkast,
        topkast.analysis,
        topkast.inference,
        topkast.methods,
        topkast.plot,
        topkast.testing,
    )
    for module in modules:
        is_automatic = f".. automodule:: {module.__name__}\n   :members:" in page
        names = set(re.findall(rf"{re.escape(module.__name__)}\.(\w+)", page))
        missing = [name for name in module.__all__ if name not in names and not is_automatic]
        assert not missing, f"docs/api.md lacks {missing} of {module.__name__}"
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_all_is_complete() -> None:
    public = {
        name
        for name, value in vars(topkast).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("topkast.")
    }
    assert set(topkast.__all__) == public | {"methods"}  # a package of its own


def _imports(path: Path) -> list[str]:
    """Modules that a file imports, except imports for type checkers only."""
    tree = ast.parse(path.read_text())
    for_types = [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    ]
    modules = []
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    return modules


ROOT = Path(topkast.__file__).parent
ADAPTERS = Path(__file__).parent.parent / "adapters"


def test_the_core_imports_no_framework_and_no_adapter() -> None:
    """Only the files of `backends` import a framework.

    The analysis assigns units by scipy, when that function is called. `topkast.plot` draws by
    matplotlib, and is imported when it is first used. Both are optional.
    """
    applications = {"topkast_demo", "topkast_paper", "topkast_study"}
    our_packages = ("topkast_torch", "topkast_jax", "topkast_cupy", *applications)
    for path in ROOT.rglob("*.py"):
        roots = {module.partition(".")[0] for module in _imports(path)}
        allowed = {"jax", "torch"} if path.parent.name == "backends" else set()
        allowed |= {"scipy"} if path.name == "_matching.py" else set()
        allowed |= {"matplotlib"} if path.parent == ROOT / "plot" else set()
        allowed |= applications if path.name == "__main__.py" else set()
        assert not roots & {*FRAMEWORKS, *our_packages} - allowed - {"hypothesis"}, path


def test_adapters_import_public_modules_only() -> None:
    public = re.compile(r"topkast(\.(adapter|kernels|reservoirs)(\..*)?|\.[A-Za-z]\w*)?$")
    for path in ADAPTERS.rglob("*.py"):
        for module in _imports(path):
            if module.partition(".")[0] == "topkast":
                assert public.match(module), f"{path}: {module}"


def test_modules_are_short_and_folders_small() -> None:
    """A file is one concept. The core's top folder has at most twenty modules, others twelve."""
    for folder in (ROOT, ADAPTERS):
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) < 400, path
        for package in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            modules = [path for path in package.glob("*.py") if path.name != "__init__.py"]
            assert len(modules) <= (20 if package == ROOT else 12), package
