import pickle

import numpy as np
import pytest
from drawn_cohort import HER2, boxes, draw_cohort, draw_set, store
from drawn_requests import FakeGenerator

from counterstain.checkpoints import CheckpointHeader
from counterstain.data.patch_set import SHARD_PATCHES, PatchSet
from counterstain.data.relabel import RelabelConfig
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import ConfigError, InputError, LeakageError, MismatchError, StorageError
from counterstain.seeding import derive
from counterstain.synthesis.masks import LayoutsConfig, SynthesisConfig
from counterstain.synthesis.synthesize import synthesize
from counterstain.taxonomy import BACKGROUND


class Painter(FakeGenerator):
    """A generator that paints each label in its colour; some of its images come out white at first."""

    method = "spade"

    def __init__(self, white=0.0, stop_after=None, header=None):
        self.header = header
        self.white, self.stop_after, self.calls = white, stop_after, 0

    def paint(self, label_masks, seeds, images, redraw):
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        drawn = HER2.palette[label_masks].copy()
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            drawn[i] = 255 if rng.random() < self.white else drawn[i] // 2 + rng.integers(0, 50)
        return drawn


CONFIG = SynthesisConfig(sampling=SamplingConfig(background_share=0.2))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "c")


def draw(cohort, out, *, generator=None, config=CONFIG, count=100, **changes):
    settings = {"count": count, "size_px": 32, "seed": 0} | changes
    return synthesize(generator or Painter(), cohort, out, config, **settings)


def images(found):
    return np.stack([found[i].image for i in range(len(found))])


def test_every_patch_knows_where_it_comes_from_and_the_mask_that_it_was_drawn_for(cohort, tmp_path):
    found = draw(cohort, tmp_path)
    row = found.patches.iloc[7]
    patch = found[7]
    assert patch.source.region == row["region"]
    assert patch.source.patient in cohort.patients("train")
    assert set(found.patches["patient"]) <= set(found.header.patients_seen)
    table = found.instances[found.instances["index"] == 7]
    assert dict(zip(table["instance"], table["subtype"], strict=True)) == patch.subtypes
    assert table["area_px"].sum() == (patch.label_mask != BACKGROUND).sum()
    every = found.instances
    assert set(every["subtype_before"]) <= set(range(1, 6))
    assert (every["subtype"] != every["subtype_before"]).mean() > 0.5
    for i in range(10):
        brightness = found[i].image.astype(int) - (HER2.palette[found[i].label_mask] // 2)
        assert len(np.unique(brightness)) == 1  # nothing but the seed's offset


def test_a_set_that_was_interrupted_ends_like_one_that_was_not(cohort, tmp_path):
    whole = draw(cohort, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        draw(cohort, tmp_path / "stopped", generator=Painter(stop_after=1))
    with pytest.raises(InputError, match="is not finished; give the same command again"):
        PatchSet.open(tmp_path / "stopped")
    resumed = Painter()
    again = draw(cohort, tmp_path / "stopped", generator=resumed)
    assert resumed.calls == 1  # the first shard was kept
    assert np.array_equal(images(whole), images(again))


def test_a_larger_set_begins_with_the_smaller_one(cohort, tmp_path):
    small = images(draw(cohort, tmp_path, count=70))
    large = draw(cohort, tmp_path, count=2 * SHARD_PATCHES + 1)
    assert np.array_equal(images(large)[:70], small)
    assert len(large.patches) == 2 * SHARD_PATCHES + 1


def test_a_set_of_2000_instances_is_balanced(cohort, tmp_path):
    found = draw(cohort, tmp_path, count=1000, size_px=64)
    balance = found.balance()
    assert balance["instances"].sum() > 2000
    assert (balance["instances"] / balance["instances"].sum() - 0.2).abs().max() < 0.02
    assert balance["area_px"].sum() == balance["area_px_before"].sum()


def test_a_damaged_shard_is_noticed_and_made_again(cohort, tmp_path):
    before = images(draw(cohort, tmp_path))
    file = tmp_path / "shards" / "00001" / "patches.parquet"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(StorageError, match="missing or damaged; give the command that made the set again"):
        PatchSet.open(tmp_path)[SHARD_PATCHES]
    assert np.array_equal(images(draw(cohort, tmp_path)), before)


def test_near_white_images_are_drawn_again_and_counted(cohort, tmp_path):
    config = CONFIG.model_copy(update={"reject": "near_white", "attempts": 20})
    found = draw(cohort, tmp_path, generator=Painter(white=0.5), config=config)
    tissue = np.array([len(found[i].subtypes) > 0 for i in range(len(found))])
    assert images(found)[tissue].mean((1, 2, 3)).max() < 255
    assert found.patches["attempts"].max() > 1
    assert (found.patches["attempts"][~tissue] == 1).all()  # a white background may be white


def test_kept_subtypes_are_not_redrawn(cohort, tmp_path):
    config = CONFIG.model_copy(update={"relabel": RelabelConfig(keep=("LCIS/DCIS",))})
    table = draw(cohort, tmp_path, config=config).instances
    assert ((table["subtype"] == 5) == (table["subtype_before"] == 5)).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"patients_seen": ("p0", "p4")}, LeakageError, "has seen p4 of the test split"),
        ({"size_px": 64}, MismatchError, "draws 64 px, 32 px were asked for"),
        ({"mpp": 1.0}, MismatchError, r"trained at 1.0 um/px, this cohort is at 0.5"),
        ({"taxonomy": HER2.merged("stained")}, MismatchError, "was trained on the subtypes non-stained"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused(cohort, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        draw(cohort, tmp_path, generator=Painter(header=header(**changes)))
    assert not any(tmp_path.iterdir())


def test_a_set_that_cannot_be_drawn_leaves_its_folder_free(cohort, tmp_path):
    with pytest.raises(InputError, match="200"):
        synthesize(Painter(), cohort, tmp_path / "set", CONFIG, count=1, size_px=200, seed=0)
    assert not (tmp_path / "set").exists()
    draw(cohort, tmp_path / "set", count=1)


def test_a_folder_of_another_set_is_left_alone(cohort, tmp_path):
    before = images(draw(cohort, tmp_path))
    with pytest.raises(MismatchError, match=r"belongs to another run .*seed was 0, now 1"):
        draw(cohort, tmp_path, seed=1)
    assert np.array_equal(images(PatchSet.open(tmp_path)), before)


def header(**changes):
    settings = {"kind": "spade", "taxonomy": HER2, "size_px": 32, "mpp": 0.5, "config": {}, "seed": 0}
    return CheckpointHeader(**settings | {"patients_seen": ("p0",), "cohort": "c"} | changes)


def pale_tissue(folder, name):
    """Training tissue of 0 and 1+ alone; 3+ is in the test part."""
    shown = [boxes(f"{name}{i}", (1, 4, 4, 24, 24), (2, 34, 34, 60, 60), slide=f"{name}{i}") for i in range(3)]
    return store(folder, *shown, boxes("test", (4, 4, 4, 30, 30), slide=f"{name}9", split="test"))


@pytest.mark.parametrize("target", ["uniform", {"HER2 0": 1, "HER2 1+": 1, "HER2 3+": 2}])
def test_nothing_becomes_a_subtype_that_training_never_showed(tmp_path, target):
    cohort = pale_tissue(tmp_path / "c", "p")
    config = CONFIG.model_copy(update={"relabel": RelabelConfig(target=target)})
    for found in (
        draw(cohort, tmp_path / "untrained", config=config),
        draw(
            cohort,
            tmp_path / "trained",
            config=config,
            generator=Painter(header=header(subtypes_unseen=HER2.names[2:])),
        ),
    ):
        assert set(found.instances["subtype"]) == {1, 2}
    taught_elsewhere = draw(cohort, tmp_path / "elsewhere", config=config, generator=Painter(header=header()))
    assert 4 in set(taught_elsewhere.instances["subtype"])


def test_a_target_that_training_never_showed_is_refused(tmp_path):
    config = CONFIG.model_copy(update={"relabel": RelabelConfig(target={"HER2 3+": 1})})
    with pytest.raises(ConfigError, match=r"nothing is left to draw, as training showed no HER2 2\+, HER2 3\+"):
        draw(pale_tissue(tmp_path / "c", "p"), tmp_path / "s", config=config)


class Redrawer(Painter):
    """Paints what is to be drawn anew and keeps the rest, as inpainting does."""

    method = "inpainting"

    def paint(self, label_masks, seeds, images, redraw):
        return np.where(redraw[..., None], HER2.palette[label_masks], images)


def with_layouts(**settings):
    return CONFIG.model_copy(update={"layouts": LayoutsConfig(**settings)})


def test_moved_instances_come_from_other_training_slides_and_say_so(cohort, tmp_path):
    found = draw(cohort, tmp_path / "moved", generator=Redrawer(), config=with_layouts(share=1.0))
    moved = found.moved.merge(found.patches, on="index", suffixes=("", "_of_mask"))
    assert len(moved) > 50
    assert (moved["slide"] != moved["slide_of_mask"]).all()
    assert set(moved["patient"]) <= set(cohort.patients("train"))
    assert found.patients == {*found.patches["patient"], *moved["patient"]}
    instances = found.instances.merge(moved[["index", "instance"]], on=["index", "instance"])
    assert len(instances) == len(moved)  # each is shown
    assert (instances["subtype"] == instances["subtype_before"]).all()
    assert draw(cohort, tmp_path / "plain").moved.empty


def test_with_own_instances_kept_only_moved_ones_and_their_surroundings_are_drawn(cohort, tmp_path):
    config = with_layouts(share=1.0, relabel=False)
    found = draw(cohort, tmp_path, generator=Redrawer(), config=config)
    sampling = SamplingConfig(background_share=1.0)  # moved instances are in place of masks centred on tumour
    real = PatchSampler(cohort, "train", 32, sampling, derive(0, "masks"))
    for i in range(20):
        own, moved = real[i], set(found.moved.loc[found.moved["index"] == i, "instance"])
        inside = np.isin(found[i].instances, list(moved))
        assert {n: s for n, s in found[i].subtypes.items() if n not in moved} == own.subtypes
        changed = (found[i].image != own.image).any(axis=-1)
        assert (own.instances[inside] == BACKGROUND).all()  # none is covered
        assert not changed[(own.instances != BACKGROUND)].any()
        assert changed.any() == bool(moved)
        assert changed.sum() > inside.sum() or not moved  # some of the background around it was drawn as well


def test_a_set_with_layouts_is_the_same_after_an_interruption(cohort, tmp_path):
    whole = draw(cohort, tmp_path / "whole", generator=Redrawer(), config=with_layouts())
    with pytest.raises(KeyboardInterrupt):
        draw(cohort, tmp_path / "cut", generator=Stopping(), config=with_layouts())
    again = draw(cohort, tmp_path / "cut", generator=Redrawer(), config=with_layouts())
    assert np.array_equal(images(whole), images(again))
    assert whole.moved.equals(again.moved)


class Stopping(Redrawer):
    def __init__(self):
        super().__init__()
        self.shards = 0

    def paint(self, *parts):
        self.shards += 1
        if self.shards > 1:
            raise KeyboardInterrupt
        return super().paint(*parts)


def test_a_set_without_layouts_does_not_mention_them():
    assert "layouts" not in CONFIG.model_dump(mode="json")
    assert SynthesisConfig(**with_layouts(share=0.5).model_dump()) == with_layouts(share=0.5)


def test_subtypes_that_are_kept_are_not_moved(cohort, tmp_path):
    config = with_layouts().model_copy(update={"relabel": RelabelConfig(keep=("HER2 0", "LCIS/DCIS"))})
    found = draw(cohort, tmp_path, config=config)
    moved = found.instances.merge(found.moved[["index", "instance"]])
    assert len(moved) > 0
    assert not moved["subtype"].isin([1, 5]).any()


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    return draw_set(folder / "set", draw_cohort(folder / "cohort", regions=1), count=70)


def sources(patches):
    return [patch.source for patch in patches]


def test_a_set_is_a_sequence_of_its_patches(patches):
    every = list(patches)
    assert len(every) == len(patches) == 70
    assert sources(every) == sources(patches[i] for i in range(70))
    assert patches[-1].source == patches[np.int64(69)].source == every[69].source
    for part in (slice(3), slice(-2, None), slice(60, 68, 3), slice(None, None, -30), slice(80, 90)):
        assert sources(patches[part]) == sources(every[part])
    for beyond in (70, -71):
        with pytest.raises(IndexError):
            patches[beyond]


def test_a_set_shows_what_it_is_and_is_opened_by_a_string(patches):
    opened = PatchSet.open(str(patches.folder))
    assert repr(opened) == f"PatchSet({patches.folder}: 70 patches of 48 px by oracle, her2, 0.5 um/px)"
    with pytest.raises(InputError, match="no such set"):
        PatchSet.open("nowhere")


def test_a_set_goes_to_another_process(patches):
    before = patches[0]
    assert np.array_equal(pickle.loads(pickle.dumps(patches))[0].image, before.image)
