import math

import pytest
import torch

from panfm.training.monitor import compute_feature_std_ratio, compute_rankme


def test_rankme_is_the_exponential_of_the_entropy_of_the_singular_values() -> None:
    singular_values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    left, _ = torch.linalg.qr(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    features = left @ torch.diag(singular_values) @ right
    shares = [0.5, 0.25, 0.125, 0.125]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert compute_rankme(features) == pytest.approx(expected, rel=1e-5)


def test_rankme_of_collapsed_and_of_full_features() -> None:
    assert compute_rankme(torch.ones(8, 4)) == pytest.approx(1.0, abs=1e-4)
    assert compute_rankme(torch.eye(4)) == pytest.approx(4.0, abs=1e-4)


def test_std_ratio_of_collapsed_and_of_spread_features() -> None:
    assert compute_feature_std_ratio(torch.ones(8, 4)) == pytest.approx(0.0, abs=1e-7)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert compute_feature_std_ratio(corners) == pytest.approx(1.0)
    assert compute_feature_std_ratio(100 * corners) == pytest.approx(1.0)  # the scale of features does not matter


def test_undefined_is_none() -> None:
    assert compute_rankme(torch.zeros(3, 2)) is None
    assert compute_rankme(torch.full((3, 2), math.nan)) is None
    assert compute_feature_std_ratio(torch.full((3, 2), math.inf)) is None
