"""What a run takes of its machine: arithmetic against the device's peak, memory and time."""

import time

import pytest
import torch

from scalelong.train.resources import Resources, memory_gb, peak_flops, resources_of


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA GeForce RTX 4090", "bf16", 165),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA T1000", "bf16", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name, precision, tflops):
    assert peak_flops(name, precision) == (None if tflops is None else tflops * 1e12)


def test_in_fp32_the_peak_is_that_of_the_products_that_torch_takes():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA H200", "fp32") == 495e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_figures_are_those_of_one_device():
    cpu = torch.device("cpu")
    found = Resources(cpu, 2 * 10**9, 4, 10e12, time.monotonic() - 100).figures(images_per_second=2000)
    assert (found["tflops_per_device"], found["mfu"]) == (1.0, 0.1)
    assert found["wall_seconds"] == pytest.approx(100, abs=1)
    assert found["memory_gb"] == memory_gb(cpu)
    assert 0.05 < found["memory_gb"] < 100


def test_a_network_that_counts_nothing_has_no_arithmetic_and_a_cpu_no_share():
    class Silent:
        def flops(self) -> int:
            raise NotImplementedError

    class Counts:
        def flops(self) -> int:
            return 7

    cpu = torch.device("cpu")
    assert resources_of(Silent(), cpu, "fp32", 1, 0.0).figures(1.0).keys() == {"wall_seconds", "memory_gb"}
    counted = resources_of(Counts(), cpu, "fp32", 1, 0.0)
    assert counted.flops_per_image == 21
    assert "mfu" not in counted.figures(1.0)
