"""README and the pages of docs/: commands that parse and run, flags that exist, links that lead to files."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from images import random_pixels, write_image
from programs import environment

import scalelong
from scalelong.__main__ import COMMANDS
from scalelong.bench.lab.command import parser as lab_parser
from scalelong.kernels import native_library
from scalelong.train.command_line import choose_recipe, parse_recipe, parse_train_arguments
from scalelong.train.commands.ema_posthoc import PosthocArguments
from scalelong.train.commands.evaluate import EvaluateArguments
from scalelong.train.commands.export import ExportArguments
from scalelong.train.commands.plan import PlanArguments
from scalelong.train.commands.prepare import PrepareArguments
from scalelong.train.commands.sample import SampleArguments
from scalelong.train.hosts.launch import LaunchConfig, split_arguments
from scalelong.train.parsing import parse
from scalelong.train.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + PAGES
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSED = {
    "sample": SampleArguments,
    "evaluate": EvaluateArguments,
    "export": ExportArguments,
    "ema-posthoc": PosthocArguments,
    "prepare": PrepareArguments,
}


def commands_of(path: Path) -> list[str]:
    """The lines that a document gives to be typed, comments and prompts left out, continued lines joined."""
    blocks = [text for language, text in FENCED.findall(path.read_text()) if language in ("", "bash")]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"\s+#.*", "", line).strip()) and command[0] != "#"]


def check_command(line: str) -> None:
    """Reads a command of this project as it would read itself, and carries out none of it."""
    words = shlex.split(line)
    if words[:2] == ["python", "-m"] and words[2].startswith("scalelong"):
        words = ["scalelong", "train", *words[3:]] if words[2] == "scalelong.train" else ["scalelong", *words[3:]]
    assert words[0] == "scalelong", line
    name, arguments = words[1], words[2:]
    assert name in COMMANDS, line
    if name in PARSED:
        parse(PARSED[name], arguments, prog=name)
    elif name == "plan":
        recipe, flags = choose_recipe(arguments, program=name)
        parse_recipe(PlanArguments, flags, prog=name, default=PlanArguments(train=RECIPES[recipe]))
    elif name == "launch":
        options, training = split_arguments(arguments)
        parse(LaunchConfig, options, prog=name)
        parse_train_arguments(training)
    elif name == "lab":
        chosen, _ = lab_parser().parse_known_args(arguments)
        choose_recipe([chosen.preset], program=name)
    else:
        assert name == "train", f"say here how {name} is read: {line}"
        parse_train_arguments(arguments)


def test_every_command_of_the_readme_parses():
    lines = commands_of(ROOT / "README.md")
    assert sum(line.startswith(("scalelong", "python -m scalelong")) for line in lines) >= 8
    for line in lines:
        if line.startswith("make "):
            target = line.split()[1]
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif line.startswith("pip install "):
            assert set(re.findall(r"\[(.*)\]", line)[0].split(",")) <= {"train", "scores"}
        else:
            check_command(line)


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*")


def ours(path: Path) -> Iterator[str]:
    """The commands and flags in the last column of the page's tables: the other columns are other projects'."""
    for line in path.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("|---"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[-1])


def test_every_flag_that_stands_beside_anothers_exists():
    help_of = {name: help_text(name) for name in ("digits-uvit", "imagenet64-edm2-s")}
    known = set().union(*(FLAG.findall(text) for text in help_of.values()))
    known |= {f"--{name.replace('_', '-')}" for name in LaunchConfig.__dataclass_fields__}
    known |= {"--config", "--print-config", "--run-folder", "--standalone", "--nproc-per-node"}
    for text in ours(ROOT / "docs" / "coming-from.md"):
        if not text.startswith("scalelong"):
            assert set(FLAG.findall(text)) <= known, text


def help_text(recipe: str) -> str:
    """The help of a recipe, as it is printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parse_train_arguments([recipe, "--help-all"])
    return printed.getvalue()


def test_every_command_that_stands_beside_anothers_parses():
    commands = [text for text in ours(ROOT / "docs" / "coming-from.md") if re.match(r"scalelong [a-z]", text)]
    assert len(commands) >= 8
    stands_for = {"RECIPE": "digits-uvit", "OWNER/NAME": "me/digits", "RUN": "runs/x", "FOLDER": "x", "DIR": "x"}
    for text in commands:
        if " " in text.removeprefix("scalelong "):
            for word, value in stands_for.items():
                text = re.sub(rf"\b{word}\b", value, text)
            complete = f"{text} digits-uvit" if text.startswith("scalelong launch") and "uvit" not in text else text
            check_command(complete)


def test_every_public_name_is_documented_and_nothing_that_is_not_there():
    documented = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert all(hasattr(importlib.import_module(module), name) for module, name in documented)
    names = {name for _, name in documented}
    assert names >= set(scalelong.__all__) - {"__version__"}
    operators = {path.stem for path in (ROOT / "kernels").glob("*.py") if f"\ndef {path.stem}(" in path.read_text()}
    assert names >= operators >= {"group_norm", "attention"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    text = FENCED.sub("", path.read_text())
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"[a-z]+:", link)]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_page_is_in_the_navigation():
    navigation = set(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert navigation == {path.name for path in PAGES} | {"index.md", "CHANGELOG.md", "CONTRIBUTING.md"}


SMALL = "--total-images 64 --images-per-step 8 --images-per-checkpoint 64 --images-per-grid 64 --sample.num-images 2 "
SMALL += "--sample.steps 2 --images-per-log 8"
MADE_SMALL = {
    "make train": ("make train", f"make train ARGS='{SMALL} --num-validation-images 8'"),
    "make test": ("make test", "make test TEST_WORKERS=1 ARGS=tests/test_write_whole.py"),
    "scalelong evaluate": ("runs/digits-uvit", "runs/digits-uvit --num-images 40 --steps 2"),
    "python -m scalelong.train": ("--data.flip True", f"--data.flip True {SMALL}"),
    "scalelong launch --num": ("8 cifar10-uvit-s2", f"2 cifar10-uvit-s2 {SMALL} --model.depth 2 --model.width 64"),
    "scalelong lab": ("--quick", "--quick --images 64 --seeds 1 --learning-rates 2^-10,2^-9 --skip-scale none"),
}
"""The command that begins so: what of it is put in another's place, so that it is done in seconds."""
NEEDS_MORE = ("pip install", "scalelong launch --hostfile")
"""An installation, which make release-check has; several hosts, which test_two_nodes.py has."""

CONSOLE_SCRIPT = "#!{}\nfrom scalelong.__main__ import main\nif __name__ == '__main__':\n    main()\n"
"""As pip writes it: the processes of a laboratory import the script again."""


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_all_commands_of_the_readme_run_in_a_fresh_clone(tmp_path):
    """In its order, with this environment's packages and the library as it is built."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    shutil.copy(native_library.PATH, clone / "kernels" / "native")
    bin_folder = clone / ".venv" / "bin"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    packages = next((clone / ".venv" / "lib").iterdir()) / "site-packages"
    (packages / "these.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (bin_folder / "scalelong").write_text(CONSOLE_SCRIPT.format(bin_folder / "python"))
    (bin_folder / "scalelong").chmod(0o755)
    (clone / ".venv" / ".installed").touch()
    (clone / "kernels" / "native" / "libscalelong_native.so").touch()
    for number in range(16):
        name = f"my-photos/{('cat', 'dog')[number % 2]}/{number}.png"
        write_image(clone / name, random_pixels(40, 36, seed=number))
    path = f"{bin_folder}:{Path(sys.executable).parent}:{environment()['PATH']}"
    env = environment({"PATH": path, "PYTHONPATH": clone / "src", "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"})
    for line in commands_of(ROOT / "README.md"):
        if line.startswith(NEEDS_MORE):
            continue
        for begin, (part, small) in MADE_SMALL.items():
            if line.startswith(begin):
                assert part in line, line
                line = line.replace(part, small)
        line = line.replace("/data/cifar10", "my-photos")
        done = subprocess.run(["bash", "-c", line], cwd=clone, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    code = next(text for language, text in FENCED.findall((ROOT / "README.md").read_text()) if language == "python")
    subprocess.run([bin_folder / "python", "-c", code], cwd=clone, env=env, check=True)
    for left in ("grid.png", "three.png", "digits-model/model.safetensors", "runs/mine/outcome.json"):
        assert (clone / left).is_file(), left
