import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, recall_score
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index, binary_precision

from counterstain.errors import InputError
from counterstain.segmentation.counts import (
    add_by_slide,
    by_slide,
    count,
    measures,
    pooled,
    subtype_variance,
)
from counterstain.taxonomy import IGNORE, Subtype, Taxonomy

THREE = Taxonomy(
    name="three",
    subtypes=(
        Subtype(id=1, name="pale", colour="#cccccc"),
        Subtype(id=2, name="dark", colour="#333333"),
        Subtype(id=3, name="duct", colour="#0000ff", counted=False),
    ),
)

# 4 of 10 background pixels wrong, recalls 3/4, 1/4, 1
DRAWN = np.array([[6, 4], [1, 3], [3, 1], [0, 2]])


def random_masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([0, 1, 2, 3, IGNORE], np.uint8), (40, 50)), rng.random((40, 50)) < 0.4


def table_of(**slides: object) -> pd.DataFrame:
    regions = pd.DataFrame({"slide": list(slides), "patient": "p", "score": None, "split": "test"})
    return add_by_slide(regions, np.array(list(slides.values())))


def test_counts_of_a_drawn_mask() -> None:
    mask = np.array([[0, 0, 1], [1, 2, IGNORE]], np.uint8)
    predicted = np.array([[False, True, True], [False, True, True]])
    assert count(mask, predicted, 4).tolist() == [[1, 1], [1, 1], [0, 1], [0, 0]]


def test_a_label_beyond_the_taxonomy_is_named() -> None:
    with pytest.raises(InputError, match=r"label 7 in a mask; expected 0 to 3 or 255"):
        count(np.full((2, 2), 7, np.uint8), np.ones((2, 2), bool), 4)


def test_measures_of_a_drawn_table() -> None:
    found = measures(DRAWN, THREE)
    assert list(found)[:5] == ["dice", "subtype_variance", "recall_pale", "recall_dark", "recall_duct"]
    assert found["dice"] == pytest.approx(2 * 6 / (2 * 6 + 4 + 4))
    assert found["iou"] == pytest.approx(6 / 14)
    assert found["precision"] == pytest.approx(6 / 10)
    assert [found["recall_pale"], found["recall_dark"], found["recall_duct"]] == [0.75, 0.25, 1.0]
    assert found["recall_background"] == 0.6
    assert found["subtype_variance"] == pytest.approx(0.0625)
    assert found["subtype_variance_ddof1"] == pytest.approx(0.125)
    assert found["subtype_variance_all"] == pytest.approx(np.var([0.75, 0.25, 1.0]))


@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_independent_libraries_on_random_masks(seed: int) -> None:
    mask, predicted = random_masks(seed)
    kept = mask != IGNORE
    truth, guess = mask[kept] > 0, predicted[kept]
    counts = count(mask, predicted, 4)
    found = measures(counts, THREE)
    tensors = torch.from_numpy(guess.astype(int)), torch.from_numpy(truth.astype(int))
    assert counts.tolist() == confusion_matrix(mask[kept], guess, labels=[0, 1, 2, 3])[:, :2].tolist()
    assert found["dice"] == pytest.approx(f1_score(truth, guess))
    assert found["dice"] == pytest.approx(binary_f1_score(*tensors).item(), abs=1e-6)
    assert found["iou"] == pytest.approx(binary_jaccard_index(*tensors).item(), abs=1e-6)
    assert found["precision"] == pytest.approx(binary_precision(*tensors).item(), abs=1e-6)
    assert found["recall_background"] == pytest.approx(recall_score(~truth, ~guess))
    for subtype in THREE.subtypes:
        of_it = mask[kept] == subtype.id
        assert found[f"recall_{subtype.name}"] == pytest.approx(recall_score(of_it[of_it], guess[of_it]))


def test_pooling_slides_equals_counting_them_as_one() -> None:
    masks = [random_masks(seed) for seed in range(4)]
    table = table_of(**{f"s{i}": count(*pair, 4) for i, pair in enumerate(masks)})
    together = count(np.hstack([mask for mask, _ in masks]), np.hstack([guess for _, guess in masks]), 4)
    assert pooled(table).tolist() == together.tolist()


def test_regions_are_added_up_by_slide_of_a_patient(tmp_path) -> None:
    regions = pd.DataFrame({"slide": "1", "patient": ["b", "a", "b"], "score": [None, "2+", None], "split": "test"})
    add_by_slide(regions, np.stack([DRAWN, 3 * DRAWN, DRAWN])).to_parquet(tmp_path / "counts.parquet")
    table = pd.read_parquet(tmp_path / "counts.parquet")
    assert by_slide(table).tolist() == [(3 * DRAWN).tolist(), (2 * DRAWN).tolist()]
    assert table["score"].isna().tolist() == [False] * 4 + [True] * 4


def test_an_absent_subtype_is_left_out_of_the_variance() -> None:
    counts = np.array([[6, 4], [1, 3], [0, 0], [0, 2]])
    assert subtype_variance(counts, (1, 2, 3)) == pytest.approx(np.var([0.75, 1.0]))
    assert np.isnan(measures(counts, THREE)["recall_dark"])


def test_the_variance_of_one_subtype_is_not_a_perfect_zero() -> None:
    assert np.isnan(subtype_variance(np.array([[6, 4], [1, 3], [0, 0], [0, 0]]), (1, 2, 3)))


def test_an_empty_table_gives_nan_for_everything() -> None:
    assert all(np.isnan(value) for value in measures(np.zeros((4, 2), np.int64), THREE).values())


def test_slide_means_weigh_slides_not_pixels() -> None:
    large = [[0, 0], [0, 1000], [500, 500], [0, 0]]
    small = [[0, 0], [1, 0], [0, 0], [0, 0]]
    found = measures(table_of(large=large, small=small), THREE)
    assert found["dice_slide_mean"] == pytest.approx((3000 / 3500 + 0) / 2)
    assert found["subtype_variance_slide_mean"] == pytest.approx(np.var([0.5, 0.5]))
