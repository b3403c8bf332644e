"""What must work where ``pip install`` put the core and Pillow alone: run by release.py with that environment's Python.

``python -I tests/installed.py FOLDER`` writes an export and a picture into the folder.
"""

import importlib.metadata
import resource
import subprocess
import sys
import time
from pathlib import Path

SECONDS_TO_A_PICTURE = 10.0
TRAINER = {"accelerate", "deepspeed", "diffusers", "pydantic", "rich", "scikit-learn", "tensorboard", "tyro"}
DRAW = """
import sys, scalelong
pipe = scalelong.Pipeline.from_pretrained(sys.argv[1])
pipe(labels=["3", "5"], num_images=2, seed=0)[0].save(sys.argv[2])
"""


def main(folder: Path) -> None:
    folder.mkdir()
    check_package()
    check_commands()
    check_operator()
    check_pipeline(folder)


def check_package() -> None:
    """The package is the installed one, typed, and no package of the trainer is here."""
    import scalelong

    assert Path(scalelong.__file__).is_relative_to(sys.prefix), scalelong.__file__
    assert Path(scalelong.__file__).with_name("py.typed").is_file()
    assert importlib.metadata.version("scalelong") == scalelong.__version__
    present = {each.metadata["Name"].lower() for each in importlib.metadata.distributions()}
    assert not present & TRAINER, present & TRAINER
    print(f"  scalelong {scalelong.__version__} of {Path(scalelong.__file__).parent}")


def check_commands() -> None:
    """The console script is there; a command that needs an extra says so in one line, and writes nothing."""
    script = Path(sys.prefix) / "bin" / "scalelong"
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert version == f"scalelong {importlib.metadata.version('scalelong')}\n", version
    refused = subprocess.run([script, "train", "digits-uvit"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, ""), refused
    assert refused.stderr == 'error: tyro is not installed: pip install "scalelong[train]"\n', refused.stderr
    assert not Path("runs").exists()
    print(f"  scalelong train: {refused.stderr}", end="")


def check_operator() -> None:
    """A fused operator runs on the native library, forward and backward, and agrees with its plain reference."""
    import torch

    from scalelong.kernels.backend import get_backend
    from scalelong.kernels.group_norm import skip_group_norm, skip_group_norm_ref

    torch.manual_seed(0)
    h, s, weight, bias = (torch.randn(size) for size in ((2, 32, 9, 9), (2, 16, 9, 9), (48,), (48,)))
    h.requires_grad_()
    backends = get_backend(skip_group_norm, h, s, 0.7, 8, weight, bias)
    assert (backends.forward, backends.backward) == ("native", "native"), backends
    y = skip_group_norm(h, s, 0.7, 8, weight, bias)
    expected = skip_group_norm_ref(h, s, 0.7, 8, weight, bias)
    gradients = [torch.autograd.grad(out.square().sum(), h)[0] for out in (y, expected)]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*gradients)
    print(f"  skip_group_norm: {backends}")


def check_pipeline(folder: Path) -> None:
    """An export of the embedded recipe's network draws a picture, from the start of Python on within ten seconds.

    Those of the CPU, all threads together: it holds on a machine that is busy with something else, too.
    """
    import torch

    import scalelong
    from scalelong.model.presets import UVIT_PRESETS
    from scalelong.train.sampling.pipeline_config import PipelineConfig

    torch.manual_seed(0)
    config = PipelineConfig(null_label=10, steps=30, guidance=1.0)
    scalelong.Pipeline(scalelong.UViT(UVIT_PRESETS["digits-uvit"]).eval(), config).save_pretrained(folder / "model")
    picture = folder / "three.png"
    began, before = time.monotonic(), cpu_seconds_of_children()
    subprocess.run([sys.executable, "-I", "-c", DRAW, folder / "model", picture], check=True)
    seconds, cpu_seconds = time.monotonic() - began, cpu_seconds_of_children() - before
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cpu_seconds < SECONDS_TO_A_PICTURE, f"a picture took {cpu_seconds:.1f} s of the CPU"
    print(f"  a picture of an export in {seconds:.1f} s, {cpu_seconds:.1f} s of the CPU, the import of torch included")


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(Path(sys.argv[1]))
