"""``--profile N``: a trace of N steps in the run folder, written once."""

import gzip
import json
from dataclasses import replace

import pytest

pytest.importorskip("deepspeed")

from running import small_config

from scalelong.train.loop import train
from scalelong.train.run_folder import profile_path

pytestmark = pytest.mark.slow

STEP = 32


def test_some_steps_are_traced_once(tmp_path, capsys):
    config = small_config(tmp_path / "run", profile=2, total_images=7 * STEP, num_validation_images=0)
    train(config)
    trace = profile_path(config.run)
    assert f"trace of the profiler, for https://ui.perfetto.dev: {trace}" in capsys.readouterr().out
    before = trace.read_bytes()
    events = json.loads(gzip.decompress(before))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#3", "ProfilerStep#4"}
    assert sum(name.startswith("aten::") for name in names) > 100
    train(replace(config, total_images=14 * STEP))
    assert trace.read_bytes() == before
