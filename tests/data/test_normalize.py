"""One home for normalisation: quantiles, no clipping, constant dimensions."""

import numpy as np
import pytest

from vla.data.normalize import Normalizer
from vla.errors import StatisticsError


def make() -> Normalizer:
    return Normalizer(np.array([-2.0, 0.0, 0.3]), np.array([2.0, 1.0, 0.3]), np.array([0.1, 0.5, 0.3]))


def test_round_trip_without_clipping() -> None:
    values = np.array([[-3.0, 0.25, 0.3], [5.0, 2.0, 0.3]], np.float32)
    normal = make().normalize(values)
    assert normal[0, 0] == pytest.approx(-1.5) and normal[1, 1] == pytest.approx(3.0)
    assert np.allclose(make().unnormalize(normal), values, atol=1e-6)


def test_a_dimension_without_range_is_zero_and_comes_back_as_its_constant() -> None:
    assert make().normalize(np.array([0.0, 0.0, 0.7]))[2] == 0
    assert make().unnormalize(np.array([0.0, 0.0, 0.9]))[2] == np.float32(0.3)


def test_plain_data_and_refusals() -> None:
    again = Normalizer.from_dict(make().to_dict())
    assert np.array_equal(again.q99, make().q99)
    with pytest.raises(StatisticsError, match="q99"):
        Normalizer.from_dict({"q01": [0], "center": [0]})
    with pytest.raises(StatisticsError, match="finite"):
        Normalizer(np.array([np.nan]), np.array([1.0]), np.array([0.0]))
    with pytest.raises(StatisticsError, match="3 dimensions"):
        make().normalize(np.zeros(4))
