"""How well the class of an image is read from the features of each block of a trained run (scalelong probe)."""

from pathlib import Path

from scalelong.train.commands.probe import ProbeArguments, probe
from scalelong.train.probing.heads import HeadsConfig

SIGMA = 0.06
"""The noise level: the middle one of the three where DDAE looks (arXiv:2303.09769)."""
HEADS = HeadsConfig(standardise=True, epochs=30, learning_rate=0.01)
"""Few images: DDAE's 15 epochs at 0.001 would end far from where they lead."""
MAX_IMAGES = 10_000


def probe_accuracies(run: Path) -> list[float]:
    """The share of held-out images whose class a linear probe names, of each block of the averaged network in order.

    Raises:
        UserError: data without labels, or with one class.
    """
    arguments = ProbeArguments(run=str(run), times=(SIGMA,), heads=HEADS, max_images=MAX_IMAGES, work=run)
    return [row.accuracy for row in probe(arguments, [])]
