"""The examples of docs/extending.md, each section as a program of its own."""

import re
import sys
import types
from pathlib import Path

import pytest

from scalelong.model import architectures  # noqa: F401 - its networks are known before any example
from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.skip_scale import SkipScale

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
LARGEST_EXAMPLE = 60


def program_of(section: str) -> str:
    """Its code blocks, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_runs(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for registry in (SkipScale, BackboneConfig):
        monkeypatch.setattr(registry, "known", dict(registry.known))
    program = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", program)  # dataclasses look their module up
    exec(compile(program_of(section), f"docs/extending.md, {section}", "exec"), vars(program))


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_is_short_and_holds_what_it_claims(section):
    lines = [line for line in program_of(section).splitlines() if line.strip()]
    assert 5 <= len(lines) <= LARGEST_EXAMPLE
    assert any(line.lstrip().startswith("assert ") for line in lines)
