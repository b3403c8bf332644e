"""What is handed out: the wheel's files and metadata, how the software is cited, and what a missing extra says."""

import email
import email.message
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from programs import environment, start_own_process

import scalelong
from scalelong.__main__ import COMMANDS
from scalelong.kernels import native_library
from scalelong.train.errors import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    line.split("==")[0].lower().replace("_", "-")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
}


def built(folder: Path, native: object) -> zipfile.ZipFile:
    """The wheel of this tree with a library that stands: compiling is left to ``make release-check``."""
    steps = ("egg_info", "--egg-base", folder, "build", "--build-base", folder, "bdist_wheel", "--dist-dir", folder)
    line = [sys.executable, "setup.py", "-q", *map(str, steps)]
    env = environment({"SCALELONG_NATIVE": native})
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    if native_library.ERROR is not None:
        pytest.skip(native_library.ERROR)
    return built(tmp_path_factory.mktemp("wheel"), native_library.PATH)


def metadata_of(wheel: zipfile.ZipFile, name: str) -> email.message.Message:
    return email.message_from_bytes(wheel.read(f"scalelong-{scalelong.__version__}.dist-info/{name}"))


def test_one_wheel_serves_every_python(wheel):
    assert Path(wheel.filename).name == f"scalelong-{scalelong.__version__}-py3-none-linux_x86_64.whl"
    about = metadata_of(wheel, "WHEEL")
    assert about["Tag"] == "py3-none-linux_x86_64"
    assert about["Root-Is-Purelib"] == "false"


def test_the_wheel_holds_the_package_the_library_and_nothing_else(wheel):
    packages = ("kernels", "model", "train", "bench")
    sources = {f"scalelong/{path.relative_to(ROOT)}" for room in packages for path in (ROOT / room).rglob("*.py")}
    own = {"scalelong/__init__.py", "scalelong/__main__.py", "scalelong/py.typed"}
    library = "scalelong/kernels/native/libscalelong_native.so"
    about = f"scalelong-{scalelong.__version__}.dist-info/"
    names = {name for name in wheel.namelist() if not name.startswith(about)}
    assert names == sources | own | {library}
    assert wheel.read(library) == native_library.PATH.read_bytes()
    assert f"{about}licenses/LICENSE" in wheel.namelist()


def test_the_wheels_metadata_is_that_of_the_project(wheel):
    about = metadata_of(wheel, "METADATA")
    assert (about["Name"], about["Version"]) == ("scalelong", scalelong.__version__)
    assert (about["Requires-Python"], about["License-Expression"]) == (">=3.11", "Apache-2.0")
    assert set(about.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    core = [need for need in about.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert {re.split(r"[<>=]", need)[0] for need in core} == {"torch", "triton", "numpy", "safetensors"}
    scripts = wheel.read(f"scalelong-{scalelong.__version__}.dist-info/entry_points.txt").decode()
    assert scripts.split("\n")[:2] == ["[console_scripts]", "scalelong = scalelong.__main__:main"]


def test_without_the_library_the_wheel_is_for_every_platform(tmp_path):
    plain = built(tmp_path, 0)
    assert str(plain.filename).endswith("-py3-none-any.whl")
    assert not [name for name in plain.namelist() if name.endswith(".so")]


def test_each_extra_is_in_the_readme_and_what_it_needs_is_pinned():
    readme = (ROOT / "README.md").read_text()
    for extra, needs in PROJECT["optional-dependencies"].items():
        assert f"`{extra}`" in readme, extra
        names = {re.split(r"[\[<>=]", need)[0] for need in needs} - {"scalelong"}
        assert names <= PINNED | {"nvidia-dali-cuda120"}, extra  # DALI for CUDA 12 in the place of the other


def test_the_changelog_and_the_citation_are_of_this_version():
    version = re.escape(scalelong.__version__)
    dated = re.search(rf"^## {version} \((\d{{4}}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert dated is not None
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert (citation["version"], citation["date-released"]) == (scalelong.__version__, dated[1])
    (paper,) = citation["references"]
    assert (paper["year"], paper["url"]) == (2023, "https://arxiv.org/abs/2310.13545")
    assert [author["family-names"] for author in paper["authors"]] == ["Huang", "Zhou", "Yan", "Lin"]


def test_the_version_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scalelong", "--version"])
    scalelong.__main__.main()
    assert capsys.readouterr().out == f"scalelong {scalelong.__version__}\n"


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))  # none of them can be imported
from scalelong.__main__ import COMMANDS, main
for name in COMMANDS:
    sys.argv = ["scalelong", name, "digits-uvit", "--out", "model"]
    try:
        main()
    except SystemExit as ended:
        print(name, ended.code)
"""


def test_every_command_without_its_extra_is_one_line_that_names_it(tmp_path, monkeypatch):
    """With the core alone; nothing is written."""
    monkeypatch.chdir(tmp_path)
    trainers = [package for package, extra in EXTRAS.items() if extra == "train" and package != "PIL"]
    out, err = start_own_process("-c", WITHOUT, " ".join(trainers)).communicate(timeout=120)
    assert out.splitlines() == [f"{name} 2" for name in COMMANDS], err
    assert err.splitlines() == ['error: tyro is not installed: pip install "scalelong[train]"'] * len(COMMANDS)
    assert list(tmp_path.iterdir()) == []


def test_packages_that_no_extra_brings_are_no_error_of_the_user(monkeypatch):
    from scalelong.train.errors import run_command

    def needs_it() -> None:
        import no_such_package_at_all  # noqa: F401 # pyright: ignore[reportMissingImports]

    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        run_command(needs_it)


def test_every_extra_that_a_missing_package_names_is_there_and_brings_it():
    distributions = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    for package, extra in EXTRAS.items():
        needs = PROJECT["optional-dependencies"]["train-base" if extra == "train" else extra]
        assert any(need.startswith(distributions.get(package, package.replace("_", "-"))) for need in needs), package


def test_the_dockerfile_installs_what_is_there():
    text = (ROOT / "Dockerfile").read_text()
    (torch,) = set(re.findall(r"torch==([\d.]+)", text))
    assert f"torch=={torch}\n" in (ROOT / "constraints.txt").read_text()
    assert f"torch=={torch}\n" in (ROOT / "Makefile").read_text()
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"kernels", "model", "train", "bench", "src", "README.md", "LICENSE", "constraints.txt"} & set(ignored)
