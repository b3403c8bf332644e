"""Two views of an image, the contrast between their features, and what both are judged by."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from scalelong.train.data.augment import Augmentation, augmented, draw_augmentation, resampled, two_views
from scalelong.train.diffusion.contrast import ContrastHeads, alignment, contrast_loss, uniformity

MANY = 2000


def draws(probability: float = 0.12, *, mirrors: bool = True, view: int = 0) -> Iterator[Augmentation]:
    return (draw_augmentation(3, p, view, probability=probability, mirrors=mirrors) for p in range(MANY))


def test_an_augmentation_is_a_function_of_seed_position_and_view():
    first, again, second = (np.stack([d.label_A for d in draws(view=view)]) for view in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    one = draw_augmentation(3, 17, 0, probability=0.12, mirrors=True)
    assert np.array_equal(one.label_A, first[17])
    images = torch.rand(8, 3, 6, 6) * 2 - 1
    whole, views = two_views(images, 3, range(4, 12), probability=0.5, mirrors=True)
    part, views_of_part = two_views(images[3:5], 3, range(7, 9), probability=0.5, mirrors=True)
    torch.testing.assert_close(part, whole[3:5])
    for one, all_of_them in zip(views_of_part, views, strict=True):
        torch.testing.assert_close(one, all_of_them[3:5])


def test_labels_say_what_is_done_and_how_often():
    """Each with its probability, mirrored in half or never; normal amounts, angles all round (EDM, table 6)."""
    labels = np.stack([d.label_A for d in draws()])
    assert labels[:, 0].mean() == pytest.approx(0.5, abs=0.05)
    for columns in ([1], [2], [3, 4], [5, 6], [7, 8]):
        assert labels[:, columns].any(axis=1).mean() == pytest.approx(0.12, abs=0.03)
    always = np.stack([d.label_A for d in draws(1.0, mirrors=False)])
    assert not always[:, 0].any()
    for column in (2, 7, 8):
        assert (always[:, column].mean(), always[:, column].std()) == pytest.approx((0, 1), abs=0.1)
    assert np.hypot(always[:, 3] + 1, always[:, 4]) == pytest.approx(1)
    assert np.square(always[:, 5:7]).sum(axis=1).mean() == pytest.approx(1, abs=0.1)
    never = [d.label_A for d in draws(0.0, mirrors=False)]
    assert not np.stack(never).any()


def test_plain_and_mirrored_images_are_exact_whatever_the_others_are():
    images = torch.rand(MANY, 1, 4, 4) * 2 - 1
    done = list(draws())
    views, labels_BA = augmented(images, done)
    assert labels_BA.shape == (MANY, 9)
    for image, view, one in zip(images, views, done, strict=True):
        if not one.resamples:
            expected = image.flip(2) if one.mirrored else image
            assert torch.equal(view, expected.flip(1) if one.upside_down else expected)
        else:
            assert not torch.equal(view, image)
            assert view.abs().max() <= 1


def found(images: torch.Tensor, matrix: list[list[float]]) -> torch.Tensor:
    return resampled(images, torch.tensor([matrix]))


def test_places_are_read_as_the_maps_say():
    images = torch.rand(1, 2, 8, 8) * 2 - 1
    torch.testing.assert_close(found(images, [[0.0, -1, 0], [1, 0, 0]]), images.rot90(1, (2, 3)))
    torch.testing.assert_close(found(images, [[1.0, 0, 0.5], [0, 1, 0]])[..., :6], images[..., 2:])
    # What is drawn is what its label says, turned round: here a shift alone.
    shifted = next(d for d in draws(0.3, mirrors=False) if d.label_A[7:].any() and not d.label_A[:7].any())
    assert np.allclose(shifted.inverse_23, [[1, 0, -0.25 * shifted.label_A[7]], [0, 1, -0.25 * shifted.label_A[8]]])
    scaled = next(d for d in draws(0.3, mirrors=False) if d.label_A[2] and not d.label_A[3:].any())
    assert np.allclose(scaled.inverse_23[:, :2], 2 ** (-0.2 * scaled.label_A[2]) * np.eye(2))
    others = [2, 3, 4, 7, 8]
    stretched = next(d for d in draws(0.3, mirrors=False) if d.label_A[5:7].any() and not d.label_A[others].any())
    amount, matrix_22 = np.hypot(*stretched.label_A[5:7]), stretched.inverse_23[:, :2]
    along = stretched.label_A[5:7] / amount
    assert np.allclose(matrix_22 @ along, 2 ** (-0.2 * amount) * along, atol=1e-5)
    assert np.linalg.det(matrix_22) == pytest.approx(1, rel=1e-5)


def test_the_loss_is_least_where_each_query_is_its_own_key():
    keys = nn.functional.normalize(torch.randn(6, 5), dim=1)
    queries = keys[2:4].clone().requires_grad_()
    loss = contrast_loss(queries, keys, 2, 0.2)
    own = (queries @ keys.T / 0.2).softmax(dim=1)[torch.arange(2), torch.arange(2, 4)]
    assert loss.item() == pytest.approx(0.4 * -own.log().mean().item(), rel=1e-5)
    assert contrast_loss(queries, keys, 0, 0.2) > loss
    assert contrast_loss(queries, keys[:1].expand(6, -1), 2, 0.2).item() == pytest.approx(0.4 * math.log(6), rel=1e-5)


def test_alignment_and_uniformity_know_their_ends():
    keys = nn.functional.normalize(torch.randn(512, 64), dim=1)
    assert alignment(keys, keys) == 0
    assert alignment(keys, -keys).item() == pytest.approx(4)
    assert uniformity(keys[:1].expand(4, -1)).item() == pytest.approx(0)
    # At right angles but for 1 / 64, the variance of a cosine: |k - k'|² = 2 - 2 cos.
    assert uniformity(keys).item() == pytest.approx(-4 + 8 / 64, abs=0.02)


def test_heads_know_no_batch_and_give_keys_no_gradient():
    heads, features = ContrastHeads(12, 32, 8), torch.randn(6, 12)
    assert heads.queries(features).norm(dim=1).tolist() == pytest.approx([1.0] * 6)
    torch.testing.assert_close(heads.queries(features)[2:3], heads.queries(features[2:3]))
    assert not heads.keys(features.requires_grad_()).requires_grad
    assert not torch.equal(heads.keys(features), heads.queries(features))
    assert not [*heads.buffers()]
