"""Where networks are probed; imports no torch, so that a report can be made without."""

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Uniform numbers that the objective makes its times of, as it does in training."""
DELTAS = (0.01, 0.1, 0.3)
"""Sizes of perturbations, in root mean squares of the image."""
