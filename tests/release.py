"""Builds the sdist, and the wheel from it, and tries each where only the core and Pillow are installed: ``make
release-check``. Not a test of ``make test``: it compiles the library twice and installs torch twice, and once to build.

Which torch is installed is pip's own configuration: by default the one of constraints.txt from PyPI, CUDA and all.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
CHECK = Path(__file__).with_name("installed.py")
WHEEL_ENDS_WITH = "-py3-none-linux_x86_64.whl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the wheel and the sdist come to lie")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("scalelong-*"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="scalelong-release-") as folder:
        sdist = build_sdist(Path(folder), out)
        wheel = build_wheel(sdist, out)
        for number, package in enumerate((wheel, sdist)):
            check(package, Path(folder) / f"environment-{number}")
    print(f"release-check: {wheel.name} and {sdist.name} are good, in {out}")


def build_sdist(folder: Path, out: Path) -> Path:
    """The sdist of what git knows in this tree, changes included: what lies about beside it must not be needed."""
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", out, cwd=tree)
    return only(out, ".tar.gz")


def build_wheel(sdist: Path, out: Path) -> Path:
    """The wheel of the sdist, built by this environment's torch, setuptools and CMake."""
    flags = ("--no-deps", "--no-build-isolation", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "wheel", "-q", *flags, "--wheel-dir", out, sdist)
    return only(out, WHEEL_ENDS_WITH)


def check(package: Path, environment: Path) -> None:
    """Installs a wheel, or an sdist with a build of its own as pip makes one, and runs installed.py there."""
    began = time.monotonic()
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    install = (python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS)
    run(*install, "--upgrade", "pip")
    run(*install, "torch==2.13.0")
    run(*install, "--build-constraint", CONSTRAINTS, "--no-cache-dir", package, "pillow")
    print(f"{package.name}: installed in {time.monotonic() - began:.0f} s", flush=True)
    run(python, "-I", CHECK, environment / "work", cwd=environment)


def only(folder: Path, suffix: str) -> Path:
    found = [path for path in folder.glob("scalelong-*") if path.name.endswith(suffix)]
    assert len(found) == 1, f"{folder} has {sorted(path.name for path in folder.iterdir())}, not one ...{suffix}"
    return found[0]


def run(*line: object, cwd: Path | None = None) -> None:
    """Runs a command in which this tree's sources cannot be found by PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(word) for word in line], cwd=cwd or Path(tempfile.gettempdir()), env=env, check=True)


if __name__ == "__main__":
    main()
