"""All that can be done with the project: ``nox --list`` shows it."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import nox
import nox.virtualenv
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2"
nox.options.sessions = ["tests", "lint", "docs"]
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")
TEST = nox.project.dependency_groups(PROJECT, "test")
COVERAGE = nox.project.dependency_groups(PROJECT, "coverage")
ECOSYSTEM = nox.project.dependency_groups(PROJECT, "ecosystem")
LINT = nox.project.dependency_groups(PROJECT, "lint")

# Two test processes share the cores: more threads in each would get in each other's way.
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def install(session: nox.Session, *packages: str) -> None:
    # PyTorch first, at its pinned version: as a dependency of another package, pip would take the
    # newest one. On Linux it brings gigabytes of CUDA, unless an index has the CPU build
    # (CONTRIBUTING.md).
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", *packages)


@nox.session
def demo(session: nox.Session) -> None:
    """Train dense, static sparse and Top-KAST networks on real data: `-- --task text`, ..."""
    install(session, ".[cpu,demo,jax]")
    session.run("python", "-m", "topkast", "demo", *session.posargs)


@nox.session
def study(session: nox.Session) -> None:
    """One of the paper's studies: `-- --list`, `-- table1`, ..."""
    install(session, ".[cpu,demo]")
    session.run("python", "-m", "topkast", "study", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, with few examples for each property."""
    install(session, "-e", ".[cpu,demo,jax,safetensors,testing]", *TEST)
    run_tests(session, *(session.posargs or ["src", "adapters", "tests"]))


def is_known(session: nox.Session, flag: str) -> bool:
    """Whether the installed XLA has a flag: it ends a process that passes another."""
    code = "import jax; jax.devices(); print('known')"
    env = {**SINGLE_THREADED, "XLA_FLAGS": flag}
    any_code = range(-64, 256)
    output = session.run("python", "-c", code, env=env, silent=True, success_codes=any_code)
    return "known" in str(output).split()


def run_tests(session: nox.Session, *arguments: str) -> None:
    """Run tests on two processes, and the examples in docstrings."""
    # Most of the JAX tests' time goes into compiling what runs once. The property session does it
    # as users do.
    quick = "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"
    flags = [flag for flag in quick if is_known(session, flag)]
    flags.append("--xla_force_host_platform_device_count=8")
    env = {**SINGLE_THREADED, "XLA_FLAGS": " ".join(flags)}
    run = "pytest", "--doctest-modules", "-n", "2", "--dist", "worksteal"
    session.run(*run, *arguments, env=env)


@nox.session
def property(session: nox.Session) -> None:  # noqa: A001 - the name that the README gives it
    """The property tests with many examples, inside jax.jit too; and all that takes long."""
    install(session, "-e", ".[cpu,demo,jax,safetensors,testing]", *TEST)
    paths = session.posargs or [
        "tests/test_analysis.py",
        "tests/test_combinations.py",
        "tests/test_compact.py",
        "tests/test_cupy_paths.py",
        "tests/test_distribution.py",
        "tests/test_exploration.py",
        "tests/test_growth_across_tensors.py",
        "tests/test_kernel_candidates.py",
        "tests/test_kernel_convolutions.py",
        "tests/test_kernel_gather.py",
        "tests/test_kernel_input.py",
        "tests/test_kernel_units.py",
        "tests/test_kernels.py",
        "tests/test_methods.py",
        "tests/test_reserve.py",
        "tests/test_rivals.py",
        "tests/test_selection.py",
        "tests/test_torch_state.py",
        "tests/test_transform.py",
        "tests/test_unit_options.py",
        "tests/test_units.py",
    ]
    env = {**SINGLE_THREADED, "TOPKAST_HYPOTHESIS_PROFILE": "thorough"}
    run = "pytest", "-n", "2", "--timeout", "1800"
    session.run(*run, *paths, env=env)
    if not session.posargs:
        session.run(*run, "-m", "slow", "tests", env=env)


# Short, and of all that depends on versions: selection with arrays of each library, transformations
# and shardings of JAX, kernels under numba and inside XLA, checkpoints.
VERSIONS = [
    "tests/test_selection.py",
    "tests/test_compact.py",
    "tests/test_inspect.py",
    "tests/test_jax_transform.py",
    "tests/test_jax_sharding.py",
    "tests/test_jax_pytrees.py",
    "tests/test_jax_checkpoint.py",
    "tests/test_jax_sparse_products.py",
    "tests/test_kernels.py",
    "tests/test_torch_state.py",
]


@nox.session
def lowest(session: nox.Session) -> None:
    """Some tests with the lowest versions that pyproject.toml allows, PyTorch excepted."""
    extras = "analysis", "cpu", "demo", "jax", "safetensors", "testing"
    requirements = [*PROJECT["project"]["dependencies"]]
    for extra in extras:
        requirements += PROJECT["project"]["optional-dependencies"][extra]
    companions = "equinox", "orbax-checkpoint"
    requirements += [one for one in TEST if Requirement(one).name in companions]
    folder = Path(session.create_tmp()).resolve()
    bounds = folder / "lowest.txt"
    bounds.write_text("\n".join(lower_bounds(requirements)) + "\n")
    # PyTorch keeps its pinned version: the old builds on PyPI bring gigabytes of CUDA. So the lower
    # bound of the extra `torch` is not tested.
    session.install("-c", "constraints.txt", "torch")
    # Flax, which asks for a newer JAX, is left out; its tests skip.
    tools = [*companions, "array-api-strict", "pytest", "pytest-timeout", "pytest-xdist"]
    session.install("-c", str(bounds), "-e", f".[{','.join(extras)}]", *tools)
    run_tests(session, *(session.posargs or VERSIONS))


def lower_bounds(requirements: list[str]) -> list[str]:
    """The lowest version that each requirement allows, as constraints of pip."""
    bounds = []
    for requirement in map(Requirement, requirements):
        if requirement.name not in ("topkast", "torch"):
            (bound,) = (part for part in requirement.specifier if part.operator == ">=")
            bounds.append(f"{requirement.name}=={bound.version}")
    return bounds


@nox.session
def newest(session: nox.Session) -> None:
    """The same tests with the newest versions for this Python, PyTorch excepted."""
    session.install("-c", "constraints.txt", "torch")
    pinned = Path(session.create_tmp()).resolve() / "torch.txt"
    lines = Path("constraints.txt").read_text().splitlines()
    pinned.write_text("".join(f"{line}\n" for line in lines if line.startswith("torch==")))
    upgrade = "--upgrade", "--upgrade-strategy", "eager"  # dependencies too, in an old environment
    packages = "-e", ".[analysis,cpu,demo,jax,safetensors,testing]", *TEST
    session.install("-c", str(pinned), *upgrade, *packages)
    run_tests(session, *(session.posargs or VERSIONS))


@nox.session
def ecosystem(session: nox.Session) -> None:
    """Other people's optimizers and trainers around the library."""
    install(session, "-e", ".[analysis,cpu,jax,safetensors,testing,torch]", *TEST, *ECOSYSTEM)
    paths = session.posargs or ["tests/ecosystem"]
    # Nothing is fetched: models are made from scratch.
    env = {**SINGLE_THREADED, "HF_HUB_OFFLINE": "1"}
    session.run("pytest", "-n", "2", *paths, env=env)


@nox.session
def coverage(session: nox.Session) -> None:
    """The lines of src and adapters that the tests run, without a GPU: at least 95 %."""
    install(session, "-e", ".[cpu,demo,jax,safetensors,testing]", *TEST, *COVERAGE)
    # No test is slower than its limit of time only because its lines are counted.
    options = ["--timeout", "900"]
    options += ["--cov", "--cov-report", "term:skip-covered", "--cov-fail-under", "95"]
    run_tests(session, *options, *(session.posargs or ["src", "adapters", "tests"]))


@nox.session
def mutation(session: nox.Session) -> None:
    """Which mistakes in the code that chooses sets no test notices: `-- --sample 0` makes all."""
    install(session, "-e", ".[cpu,demo,jax,safetensors,testing]", *TEST)
    env = {**SINGLE_THREADED, "PYTHONPATH": "tests"}
    session.run("python", "-m", "mutation.run", *session.posargs, env=env)


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist: built, checked, and installed in bare environments, where the demo runs."""
    session.install("build", "twine")
    folder = Path(session.create_tmp()).resolve()
    dist, empty = folder / "dist", folder / "empty"
    shutil.rmtree(folder)
    empty.mkdir(parents=True)
    session.run("python", "-m", "build", "--outdir", str(dist))
    files = sorted(dist.iterdir())
    session.run("twine", "check", "--strict", *map(str, files))
    constraints = str(Path("constraints.txt").resolve())
    for file in files:
        bare = folder / f"bare_{file.suffix.strip('.')}"
        session.run("python", "-m", "venv", str(bare))
        python = str(bare / ("Scripts" if os.name == "nt" else "bin") / "python")
        pip = python, "-m", "pip", "install", "--quiet", "-c", constraints
        session.run(*pip, "torch", external=True)
        session.run(*pip, f"topkast[cpu,demo] @ {file.as_uri()}", external=True)
        with session.chdir(empty):
            session.run(python, "-m", "topkast", "demo", external=True)
    if "urls" not in nox.project.load_toml("pyproject.toml")["project"]:
        session.warn("project.urls is not set: see 'Publishing a version' in CONTRIBUTING.md")


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, lint rules, types."""
    install(session, "-e", ".[cpu,demo,jax,safetensors,testing]", *TEST, *LINT, "nox")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy", "src", "adapters", "tests", "benchmarks", "noxfile.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, into docs/_build/html; warnings are errors."""
    install(session, "-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


def find_gpu(session: nox.Session) -> None:
    """End the session as skipped where there is no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        session.skip("no GPU: NVIDIA's driver is not installed")
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        session.skip("no GPU: NVIDIA's driver finds none")


def prepare_for_gpu(session: nox.Session) -> dict[str, str]:
    """Install all three libraries for CUDA 12; returns what to set in the environment.

    Under ``nox --no-venv`` nothing is installed: the sources are used, beside what an installation
    would say of them.
    """
    # JAX takes most of the memory by default, which the others need too.
    env = {"JAX_PLATFORMS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not isinstance(session.virtualenv, nox.virtualenv.PassthroughEnv):
        session.install("jax[cuda12]", "-e", ".[cupy,demo,jax,testing,torch]", *TEST)
        return env
    folder = Path(session.create_tmp())
    described = folder / "topkast-0.dist-info"
    described.mkdir(exist_ok=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: topkast\nVersion: 0\n")
    lines = []
    for group, entries in PROJECT["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (described / "entry_points.txt").write_text("\n".join(lines))
    root = Path(__file__).parent
    places = [str(root / "src"), str(root / "adapters"), str(folder)]
    given = os.environ.get("PYTHONPATH")  # of somebody whose packages lie elsewhere
    return env | {"PYTHONPATH": os.pathsep.join([*places, given] if given else places)}


@nox.session
def gpu(session: nox.Session) -> None:
    """What needs a GPU, in CuPy, PyTorch and JAX; `nox --no-venv -s gpu` installs nothing."""
    find_gpu(session)
    env = prepare_for_gpu(session)
    # Without the settings of the other tests, and what those import. What libraries warn of on
    # somebody's GPU is not for these tests to judge.
    alone = ["--noconftest", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    paths = session.posargs or ["tests/test_gpu.py", "tests/test_gpu_training.py"]
    session.run("python", "-m", "pytest", "-ra", *alone, *paths, env=env, external=True)


@nox.session
def gpu_bench(session: nox.Session) -> None:
    """Benchmarks on a GPU, into benchmarks/results/<device>.json and .md."""
    find_gpu(session)
    env = prepare_for_gpu(session)
    script = os.path.join("benchmarks", "gpu.py")
    session.run("python", script, *session.posargs, env=env, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks: `nox -s bench -- selection` runs one of them. Leave the machine alone."""
    install(session, ".[cpu,demo,jax]")
    names = session.posargs or [
        "selection",
        "optimizer_step",
        "jax_training_step",
        "jax_update",
        "inference",
        "orderings",
        "refreshes",
        "sparse_kernels",
        "training_step",
        "parallel_layers",
    ]
    for name in names:
        session.run("python", os.path.join("benchmarks", f"{name}.py"))
