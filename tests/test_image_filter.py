import numpy as np
import pytest
import torch
from drawn_cohort import HER2, draw_cohort
from drawn_requests import FakeGenerator

from counterstain.audit import JudgeFilterConfig
from counterstain.audit import judge as judge_module
from counterstain.audit.judge import JudgeFilter
from counterstain.checkpoints import CheckpointHeader
from counterstain.data.sampling import SamplingConfig
from counterstain.errors import MismatchError
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.synthesize import Verdict, rejections, synthesize

CONFIG = SynthesisConfig(sampling=SamplingConfig(background_share=0.2), attempts=3)


class Painter(FakeGenerator):
    """Paints each label in its own grey, but often the wrong one."""

    method = "spade"

    def __init__(self, wrong=0.5):
        self.wrong = wrong

    def paint(self, label_masks, seeds, images, redraw):
        drawn = np.zeros((*label_masks.shape, 3), np.uint8)
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            shift = int(rng.integers(1, 5)) if rng.random() < self.wrong else 0
            labels = np.where(label_masks[i] > 0, (label_masks[i] - 1 + shift) % 5 + 1, 0)
            drawn[i] = (40 * labels)[..., None]
        return drawn


class Eye(torch.nn.Module):
    """Takes each pixel for the label whose grey it has."""

    device = torch.device("cpu")

    def forward(self, images):
        labels = (images[..., 0] // 40).long()
        return 20.0 * torch.nn.functional.one_hot(labels, 6).movedim(-1, 1).float()


def header(seen=("p0",)):
    return CheckpointHeader(
        kind="judge", taxonomy=HER2, size_px=32, mpp=0.5, config={}, seed=0, patients_seen=seen, cohort="c", sha256="j"
    )


def judge(seen=("p0",), **settings):
    return JudgeFilter(Eye(), header(seen), JudgeFilterConfig(**{"min_area_px": 20} | settings))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "c")


def draw(cohort, out, filtered=None, *, wrong=0.5, count=60, **changes):
    return synthesize(Painter(wrong), cohort, out, CONFIG, count=count, size_px=32, seed=0, judge=filtered, **changes)


def right(found, i, min_area_px=20):
    patch = found[i]
    judged = [k for k, area in patch.areas_px.items() if area >= min_area_px]
    looks = [patch.image[patch.instances == k, 0][0] == 40 * patch.subtypes[k] for k in judged]
    return np.mean(looks) if looks else 1.0


def test_a_filtered_set_is_as_long_and_shows_what_was_asked(cohort, tmp_path):
    found = draw(cohort, tmp_path, judge(seen=("elsewhere",), masks=20))
    assert len(found) == 60
    assert "elsewhere" in found.header.patients_seen
    assert min(right(found, i) for i in range(60)) >= 0.75
    assert found.header.settings["filter"] == {"judge": "j", "agreement": 0.75, "min_area_px": 20, "masks": 20}


def test_what_passes_at_once_is_the_image_of_the_unfiltered_set(cohort, tmp_path):
    plain, filtered = draw(cohort, tmp_path / "plain"), draw(cohort, tmp_path / "filtered", judge())
    assert plain.judged.empty
    assert plain.patches["attempts"].max() == 1
    passed = filtered.patches.loc[filtered.patches["attempts"] == 1, "index"].tolist()
    assert 10 < len(passed) < 55
    for i in passed:
        assert np.array_equal(plain[i].image, filtered[i].image)


def test_rejections_are_on_record_by_subtype(cohort, tmp_path):
    found = draw(cohort, tmp_path, judge())
    table = rejections(found.judged, HER2)
    assert table["subtype"].tolist() == list(HER2.names)
    assert table["rejection_rate"].between(0.35, 0.75).all()  # half are painted wrongly
    assert (table["disagreed"] <= table["drawn"]).all()
    refused_images = found.judged[~found.judged["kept"]].groupby(["index", "drawing"]).ngroups
    never = (~found.patches["kept"]).sum()
    assert refused_images == (found.patches["attempts"] - 1).sum() + never


def test_a_mask_that_never_passes_gives_its_place_to_others_and_is_counted_in_the_end(cohort, tmp_path):
    found = draw(cohort, tmp_path, judge(masks=2), wrong=1.0)
    tissue = found.judged["index"].unique()
    attempts = found.patches.set_index("index")["attempts"]
    assert attempts.max() == 6  # two masks, three attempts each
    assert (found.judged.groupby("index")["kept"].any().sum()) == 0
    plain = draw(cohort, tmp_path / "plain", wrong=1.0)
    other = [i for i in tissue if attempts[i] == 6 and found[i].source != plain[i].source]
    assert len(other) > 0.9 * (attempts == 6).sum()


def test_a_mask_with_nothing_to_judge_passes_although_it_takes_the_place_of_a_refused_one(cohort, tmp_path):
    config = CONFIG.model_copy(update={"attempts": 1})
    options = {"count": 128, "size_px": 32, "seed": 0, "judge": judge(masks=4, min_area_px=300)}
    found = synthesize(Painter(1.0), cohort, tmp_path, config, **options)
    judged_last = found.judged.groupby("index")["drawing"].max().reindex(range(128), fill_value=-1)
    drawn_last = found.patches.set_index("index")["attempts"] - 1
    assert found.patches.set_index("index")["kept"].equals(judged_last != drawn_last)  # whatever is judged is refused
    assert (found.patches["kept"] & (found.patches["attempts"] > 1)).sum() > 10
    assert found.patches.loc[~found.patches["kept"], "attempts"].eq(4).all()


def test_a_filtered_set_in_parts_is_the_same_set(cohort, tmp_path):
    whole = draw(cohort, tmp_path / "whole", judge(), count=100)
    for shard in (1, 0):
        draw(cohort, tmp_path / "parts", judge(), count=100, shards=[shard])
    parts = draw(cohort, tmp_path / "parts", judge(), wrong=None, count=100)  # draws nothing more
    assert all(np.array_equal(whole[i].image, parts[i].image) for i in range(100))
    assert whole.judged.equals(parts.judged)


def test_a_verdict_does_not_depend_on_the_other_images(cohort, tmp_path):
    found = draw(cohort, tmp_path)
    patches = [found[i] for i in range(40)]
    redraw = np.stack([patch.instances > 0 for patch in patches])
    together = judge()(patches, redraw)
    assert together == [judge()([p], redraw[i : i + 1])[0] for i, p in enumerate(patches)]
    assert judge()([], redraw[:0]) == []
    nothing_redrawn = judge()(patches, np.zeros_like(redraw))
    assert nothing_redrawn == [Verdict(kept=True, instances=())] * 40


def test_a_judge_of_another_size_is_refused(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "load_judge", lambda _: (Eye(), header()))
    with pytest.raises(MismatchError, match=r"the judge learnt from 32 px .* the images are of 64 px"):
        JudgeFilter.load(tmp_path, cohort, JudgeFilterConfig(), size_px=64)
