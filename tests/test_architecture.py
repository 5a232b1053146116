"""The shape of the code base: who may import whom, file sizes, and names that shadow nothing."""

import ast
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"tdm_r1": ROOT / "tdm_r1", "tdm_kernels": ROOT / "kernels" / "tdm_kernels"}
MAX_LINES = 400

# From the bottom up: a unit (a file or folder of tdm_r1) imports its own layer and those below.
LAYERS = (
    {"errors"},
    {"schema"},
    {"config", "recipe_checks", "files", "flow", "graphs"},
    {"geneval", "shapes", "signs", "prompts", "rewards"},
    {"models"},
    {"text", "vae"},
    {"pipeline"},
    {"exported"},
    {"arguments", "trajectory"},
    {"calibrate"},
    {"engine"},
    {"training", "export"},
    {"train", "assets"},
    {"demo"},
    {"__main__"},
)
LAYER = {unit: depth for depth, layer in enumerate(LAYERS) for unit in layer}

# Stricter than the layers: (importer, what it must not know).
FORBIDDEN = [
    ("config", {"flow", "graphs"}),
    ("flow", {"config", "graphs"}),
    ("graphs", {"config", "flow"}),
    ("models", {"geneval", "shapes", "signs", "prompts", "rewards", "config"}),
    ("text", {"geneval", "shapes", "signs", "prompts", "rewards"}),
    ("vae", {"geneval", "shapes", "signs", "prompts", "rewards"}),
    ("pipeline", {"geneval", "shapes", "signs", "prompts", "rewards"}),
    ("exported", {"geneval", "shapes", "signs", "prompts", "rewards"}),
    ("engine", {"geneval", "shapes", "signs", "prompts", "rewards"}),
    ("export", {"training", "rewards"}),
    ("training", {"export"}),
]

# Imported by one file at most, so that everything else works without them.
ONE_OWNER = ["deepspeed", "onnx", "tensorrt", "tensorrt_rtx", "rapidocr", "onnxruntime", "peft"]
ONE_OWNER += ["matplotlib", "mlflow", "tensorboard", "wandb"]


def _sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@cache
def _imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere, also inside functions.

    `from a import b` counts as `a.b`: b may be a module.
    """
    package = _module(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def _module(path: Path) -> str:
    base = ROOT / "kernels" if ROOT / "kernels" in path.parents else ROOT
    parts = list(path.relative_to(base).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _unit(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tdm_r1" and len(parts) > 1 else None


def _unit_imports() -> list[tuple[Path, str, str]]:
    """(file, its unit, unit that it imports) for every import inside tdm_r1."""
    found = []
    for path in _sources(PACKAGES["tdm_r1"]):
        importer = _unit(_module(path))
        for name in _imports(path):
            imported = _unit(name)
            if importer and imported and importer != imported:
                found.append((path, importer, imported))
    return found


def test_every_unit_has_a_layer():
    units = {_unit(_module(path)) for path in _sources(PACKAGES["tdm_r1"])} - {None}
    assert not units - LAYER.keys(), "give them a place in LAYERS"


def test_arrows_point_down():
    wrong = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path, importer, imported in _unit_imports()
        if imported in LAYER and LAYER[imported] > LAYER[importer]
    ]
    assert not wrong


@pytest.mark.parametrize(("importer", "unknown"), FORBIDDEN)
def test_units_know_no_more_than_they_must(importer, unknown):
    known = {imported for _, unit, imported in _unit_imports() if unit == importer}
    assert not known & unknown


def test_the_package_itself_imports_nothing_heavy():
    # `import tdm_r1` has to stay instant: names are looked up when they are asked for.
    source = (PACKAGES["tdm_r1"] / "__init__.py").read_text()
    eager = [n for n in ast.parse(source).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {a.name for n in eager if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in eager if isinstance(n, ast.ImportFrom)}
    assert not modules - {"__future__", "typing", "importlib"}


def test_kernels_know_no_model():
    for path in _sources(PACKAGES["tdm_kernels"]):
        roots = {name.split(".")[0] for name in _imports(path)}
        assert not roots & {"tdm_r1", "diffusers", "transformers", "deepspeed"}, path


def test_packages_do_not_import_tests_or_benchmarks():
    for path in _sources(*PACKAGES.values()):
        assert not {name.split(".")[0] for name in _imports(path)} & {"tests", "bench"}, path


@pytest.mark.parametrize("dependency", ONE_OWNER)
def test_one_file_owns_each_optional_dependency(dependency):
    owners = [
        path.relative_to(ROOT)
        for path in _sources(*PACKAGES.values())
        if any(name.split(".")[0] == dependency for name in _imports(path))
    ]
    assert len(owners) <= 1, owners


def test_no_module_shadows_a_dependency():
    # `deepspeed tdm_r1/train.py` and `python bench/x.py` put that folder first on sys.path.
    taken = set(packages_distributions()) | set(sys.stdlib_module_names)
    taken |= {"onnx", "tensorrt", "tensorrt_rtx", "triton", "kernels", "wandb", "flash_attn"}
    ours = {
        entry.stem
        for folder in (PACKAGES["tdm_r1"], ROOT / "bench")
        for entry in folder.glob("*")
        if entry.suffix == ".py" or entry.is_dir()
    }
    assert not ours & taken


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow PyPI's `kernels`


def test_files_stay_short():
    folders = [*PACKAGES.values(), ROOT / "bench", ROOT / "tests"]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in _sources(*folders)
        if (lines := len(path.read_text().splitlines())) >= MAX_LINES
    }
    assert not long
