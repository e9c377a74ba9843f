import numpy as np
import pytest

from counterstain.audit.fidelity import Sample, frechet_distance, groups_of, jackknife, kernel_distance
from counterstain.data.patches import Patch, Source


def difference(real, drawn):
    return float(real.mean() - drawn.mean())


def sample(seed, groups=8, each=20, shift=0.0, name="p"):
    rng = np.random.default_rng(seed)
    of_group = rng.normal(size=(groups, 1, 3))
    features = (of_group + rng.normal(size=(groups, each, 3)) + shift).reshape(-1, 3)
    return Sample(features=features, groups=np.repeat([f"{name}{i}" for i in range(groups)], each))


def test_of_a_mean_it_is_the_interval_over_the_means_of_groups():
    real, drawn = sample(0, name="a"), sample(1, name="b")
    found = jackknife(difference, real, drawn)
    means = [s.features.reshape(8, -1).mean(1) for s in (real, drawn)]
    variance = sum(m.var(ddof=1) / 8 for m in means)
    assert found.value == pytest.approx(means[0].mean() - means[1].mean())
    reach = (found.high - found.low) / 2
    assert 2.14 <= reach / np.sqrt(variance) <= 2.37  # Student's quantile for 14 and for 7 degrees of freedom


def test_groups_of_both_samples_are_left_out_together_those_of_one_alone():
    real = sample(0)
    drawn = Sample(features=real.features + 1, groups=real.groups)
    found = jackknife(difference, real, drawn)
    assert found.high - found.low == pytest.approx(0, abs=1e-9)
    found = jackknife(difference, real, sample(1, groups=9))
    assert found.low < found.value < found.high


def test_groups_of_unequal_size_count_by_their_size():
    even = sample(0, groups=6)
    doubled = np.concatenate([even.features, even.features[-20:]])
    uneven = Sample(features=doubled, groups=np.append(even.groups, even.groups[-20:]))
    other = Sample(features=np.zeros((4, 3)), groups=np.array(["x", "x", "y", "y"]))
    found = jackknife(difference, uneven, other)
    shares = np.array([1, 1, 1, 1, 1, 2]) / 7
    means = even.features.reshape(6, -1).mean(1)
    expected = np.mean((means - means.mean()) ** 2 / (1 / shares - 1))
    # Welch: the other sample's groups are all alike and add nothing.
    assert (found.high - found.value) == pytest.approx(2.5706 * np.sqrt(expected), rel=0.01)


def test_an_interval_shrinks_with_more_patients():
    few = jackknife(frechet_distance, sample(0, 8, name="a"), sample(1, 8, shift=1, name="b"))
    many = jackknife(frechet_distance, sample(0, 64, name="a"), sample(1, 64, shift=1, name="b"))
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.6 * (few.high - few.low)


def test_a_frechet_distance_is_never_below_nothing_and_one_group_has_no_interval():
    assert jackknife(frechet_distance, sample(0, name="a"), sample(1, name="b"), least=0).low >= 0
    found = jackknife(kernel_distance, sample(0), sample(1, groups=1, name="b"))
    assert np.isfinite(found.value)
    assert np.isnan(found.low)


def test_few_patients_are_replaced_by_their_regions():
    def patch(patient, region):
        source = Source(region=region, slide=patient, patient=patient, y_px=0, x_px=0)
        image, instances = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.int32)
        return Patch(image=image, instances=instances, subtypes={}, source=source)

    many = [patch(f"p{i}", f"r{i}") for i in range(6)]
    few = [patch("q", f"q{i}") for i in range(6)]
    assert groups_of(many, many)[0].tolist() == [f"p{i}" for i in range(6)]
    assert groups_of(many, few)[1].tolist() == [f"q{i}" for i in range(6)]
