"""Patches redrawn by hand: instances one by one, undone, saved, kept in a set."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from drawn_cohort import HER2, draw_cohort
from drawn_requests import FakeGenerator
from PIL import Image

import counterstain as cs
from counterstain.api.drawing import instance_table, ways_to_draw
from counterstain.checkpoints import CheckpointHeader
from counterstain.data import patch_set
from counterstain.data.overlays import outlined, outlined_region
from counterstain.errors import ConfigError, InputError, LeakageError, MismatchError
from counterstain.synthesis import by_hand


class Painter(FakeGenerator):
    """Inpaints by painting in the colour of the label."""

    method = "inpainting"

    def paint(self, label_masks, seeds, images, redraw):
        return np.where(redraw[..., None], HER2.palette[label_masks], images)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("by hand") / "c")


@pytest.fixture
def patch(cohort):
    return cohort.patch(0, 0, 0, 64)


PAINTER = cs.Generator(Painter())


def header(**changes):
    known = {"kind": "diffusion", "taxonomy": HER2, "size_px": 64, "mpp": 0.5, "config": {}, "seed": 0}
    return CheckpointHeader(**known | {"patients_seen": ("p0",), "cohort": "c"} | changes)


def test_only_the_chosen_instance_changes(patch):
    work = PAINTER.redraw(patch, {1: "HER2 3+"}, seed=4)
    inside = patch.instances == 1
    assert (work.patch.image[inside] == HER2.palette[4]).all()
    assert np.array_equal(work.patch.image[~inside], patch.image[~inside])
    assert work.patch.subtypes == patch.subtypes | {1: 4}
    assert work.steps[0].instances == {1: (HER2.name_of(patch.subtypes[1]), "HER2 3+")}


def test_each_drawing_goes_on_from_the_last_and_can_be_undone(patch):
    first = PAINTER.redraw(patch, {1: "HER2 3+"})
    both = PAINTER.redraw(first, {2: "HER2 0"})
    assert both.patch.subtypes == patch.subtypes | {1: 4, 2: 1}
    assert np.array_equal(both.undone().patch.image, first.patch.image)
    assert both.undone().undone().patch is patch
    assert patch is both.undone().undone().undone().patch


def test_what_cannot_be_drawn_is_said(patch):
    with pytest.raises(InputError, match="unknown instances"):
        PAINTER.redraw(patch, {99: "HER2 0"})
    with pytest.raises(InputError, match="choose one at least"):
        PAINTER.redraw(patch, {})
    with pytest.raises(ConfigError, match="was not trained for any"):
        PAINTER.redraw(patch, {1: "HER2 0"}, guidance=2.0)
    with pytest.raises(InputError, match="styles come from a cohort"):
        PAINTER.redraw(patch, {1: "HER2 0"}, style="p0")
    assert PAINTER.styles == ()


def test_nothing_is_redrawn_as_a_subtype_that_training_never_showed(patch):
    generator = cs.Generator(Painter())
    generator.drawer.header = header(subtypes_unseen=("HER2 3+",))
    with pytest.raises(InputError, match=r"^HER2 3\+: the generator's training tissue showed none; choose another"):
        generator.redraw(patch, {1: "HER2 3+"})
    assert generator.redraw(patch, {1: "HER2 0"}).patch.subtypes[1] == 1


def test_a_saved_image_says_what_it_was_drawn_from(patch):
    image = Image.open(io.BytesIO(PAINTER.redraw(patch, {1: "HER2 3+"}, seed=7).png()))
    about = json.loads(image.text["counterstain"])
    assert image.text["Description"] == "Generated image, not real tissue"
    assert about["steps"][0]["seed"] == 7
    assert about["source"]["region"] == patch.source.region


def test_patches_are_added_to_a_set_one_by_one(cohort, patch, tmp_path):
    for seed in range(3):
        found = cs.add_to_set(PAINTER.redraw(patch, {1: "HER2 3+"}, seed=seed), cohort, out=tmp_path / "kept")
        assert len(found) == seed + 1
    assert found.patches["seed"].tolist() == [0, 1, 2]
    assert json.loads(found.patches["steps"][1])[0]["seed"] == 1
    assert found[2].subtypes[1] == 4
    before = found.instances.set_index(["index", "instance"])["subtype_before"]
    assert before[2, 1] == patch.subtypes[1]
    assert set(found.header.patients_seen) == set(cohort.patients("train"))


def test_the_set_goes_on_into_the_next_shard(cohort, patch, tmp_path, monkeypatch):
    for module in (patch_set, by_hand):
        monkeypatch.setattr(module, "SHARD_PATCHES", 2)
    for seed in range(5):
        found = cs.add_to_set(PAINTER.redraw(patch, {1: "HER2 3+"}, seed=seed), cohort, out=tmp_path / "kept")
    assert found.patches["seed"].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(found[4].image, found[0].image)


def test_decisions_about_its_patches_stay_when_the_set_grows_by_those_of_another_generator(cohort, patch, tmp_path):
    work = PAINTER.redraw(patch, {1: "HER2 3+"})
    cs.add_to_set(work, cohort, out=tmp_path / "kept")
    cs.Review(tmp_path / "kept", "ada").decide(0, "reject")
    work = PAINTER.redraw(patch, {1: "HER2 3+"}, seed=1)
    cs.add_to_set(replace(work, patients=frozenset({"elsewhere"}), nuclei=True), cohort, out=tmp_path / "kept")
    assert cs.Review(tmp_path / "kept").rejected == (0,)


def test_no_patch_is_lost_where_the_writing_of_the_next_was_killed(cohort, patch, tmp_path):
    work, out = PAINTER.redraw(patch, {1: "HER2 3+"}, seed=5), tmp_path / "kept"
    cs.add_to_set(work, cohort, out=out)
    shard = out / "shards" / "00000"
    shard.rename(shard.with_suffix(".before"))  # what is on disk between the two renamings
    found = cs.add_to_set(PAINTER.redraw(patch, {2: "HER2 0"}, seed=6), cohort, out=out)
    assert found.patches["seed"].tolist() == [5, 6]
    shutil.copytree(shard, shard.with_suffix(".before"))
    assert len(cs.add_to_set(PAINTER.redraw(work, {1: "HER2 0"}), cohort, out=out)) == 3
    with pytest.raises(InputError, match="has this drawing already, as patch 0; nothing was added"):
        cs.add_to_set(work, cohort, out=out)


def test_only_drawn_training_patches_of_one_size_are_kept(cohort, patch, tmp_path):
    with pytest.raises(InputError, match="nothing was drawn"):
        cs.add_to_set(PAINTER.redraw(patch, {1: "HER2 0"}).undone(), cohort, out=tmp_path / "kept")
    held_out = cohort.patch(int(cohort.positions("test")[0]), 0, 0, 64)
    with pytest.raises(LeakageError, match="is not of the training part"):
        cs.add_to_set(PAINTER.redraw(held_out, {1: "HER2 0"}), cohort, out=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    cs.add_to_set(PAINTER.redraw(patch, {1: "HER2 0"}), cohort, out=tmp_path / "kept")
    smaller = PAINTER.redraw(cohort.patch(0, 0, 0, 48), {1: "HER2 0"})
    with pytest.raises(MismatchError, match="size_px"):
        cs.add_to_set(smaller, cohort, out=tmp_path / "kept")


def test_instances_are_listed_with_their_stain(patch):
    table = instance_table(patch)
    assert table["instance"].tolist() == sorted(patch.subtypes)
    assert table["area_px"].tolist() == [patch.areas_px[i] for i in table["instance"]]
    brown = instance_table(PAINTER.redraw(patch, {1: "HER2 2+"}).patch)
    assert brown["dab"][0] > table["dab"][0]


def test_without_a_generator_there_is_nothing_to_draw_with(cohort, tmp_path):
    with pytest.raises(InputError, match="give --generator DIR"):
        ways_to_draw(cohort, [])
    phantom = cs.make_phantom(tmp_path / "p", slides=1, regions=1, size_px=64)
    assert list(ways_to_draw(phantom, [])) == ["Oracle"]


def test_outlines_have_the_colours_of_the_subtypes_and_stay_inside(patch, cohort):
    image = outlined(patch)
    changed = (image != patch.image).any(axis=-1)
    assert not changed[patch.instances == 0].any()
    assert (image[changed] == HER2.palette[patch.label_mask[changed]]).all()
    assert outlined_region(cohort, 0, 40).shape == (40, 40, 3)
