"""What may leave the hospital: nothing that names a patient, and nothing that is not said."""

import hashlib
import json
import re

import numpy as np
import pytest
from drawn_cohort import draw_cohort, draw_set
from PIL import Image

import counterstain as cs
from counterstain.data.patch_set import PatchSet
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.storage import write_json


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("release") / "cohort")


def traced(patches, alarms=()):
    header = patches.header
    about = {"method": header.method, "generator": header.generator, "cohort": header.cohort, "seed": str(header.seed)}
    found = {"found": ["Copies: none."], "verdict": "No trace.", "alarms": list(alarms), "tests": [], "figures": {}}
    (patches.folder / "trace").mkdir(exist_ok=True)
    write_json(patches.folder / "trace" / "trace.json", about | found | {"set": "p1-secret"})
    return patches


def test_no_file_of_a_release_names_a_patient_a_slide_or_a_place(cohort, tmp_path):
    patches = traced(draw_set(tmp_path / "p1-set", cohort, count=20, seen=["elsewhere"]))
    out = cs.release(patches, out=tmp_path / "shared")
    names = {*cohort.regions["patient"], *cohort.regions["slide"], *cohort.regions["region"], "elsewhere", "p1-secret"}
    files = [file for file in out.rglob("*") if file.is_file()]
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".png":
            chunks = re.findall(rb"IHDR|IDAT|IEND|tEXt|iTXt|zTXt|tIME|eXIf|pHYs", content)
            assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
            with Image.open(file) as image:
                assert image.info == {}
        else:
            for name in names:
                assert not re.search(rf"\b{re.escape(name)}\b", content.decode()), (file, name)
            assert str(tmp_path) not in content.decode()
    assert {file.suffix for file in files} == {".png", ".jsonl", ".yaml", ".md", ".json", ""}
    card = (out / "README.md").read_text()
    assert "The images derive from 4 patients" in card
    assert "Traced: Copies: none." in card
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert len((out / "SHA256SUMS").read_text().splitlines()) == len(files) - 2  # itself, and the card to be filled in


def test_images_are_in_another_order_that_the_set_alone_knows(cohort, tmp_path):
    patches = traced(draw_set(tmp_path / "set", cohort, count=20))
    out = cs.release(patches, out=tmp_path / "shared")
    order = json.loads((patches.folder / "releases.jsonl").read_text())["patches"]
    assert sorted(order) == list(range(20)) != order
    for number, index in enumerate(order):
        drawn = patches[index]
        shown = [np.array(Image.open(out / "train" / kind / f"{number:06d}.png")) for kind in ("images", "masks")]
        assert np.array_equal(shown[0], drawn.image)
        assert np.array_equal(shown[1], drawn.label_mask)
        instances = np.array(Image.open(out / "train" / "instances" / f"{number:06d}.png"))
        assert sorted(set(instances.ravel().tolist()) - {0}) == list(range(1, len(drawn.subtypes) + 1))
    assert cs.release(patches, out=tmp_path / "again").exists()
    assert len((patches.folder / "releases.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "alarms", "option", "why"),
    [
        ({}, None, "untraced", "nobody has checked whether its images can be traced.*counterstain trace"),
        ({}, ["copies"], "with_alarm", r"alarm \(copies\)"),
        ({"method": "inpainting"}, (), "with_real_tissue", "around redrawn instances the images are real tissue"),
        (
            {"settings": {"counterstain": {"shows": "contrast"}}},
            (),
            "with_real_tissue",
            "nuclei in the images are those",
        ),
        ({"method": "of another package"}, (), "with_real_tissue", "is not known here"),
    ],
)
def test_what_may_not_leave_unsaid_is_refused_and_then_stands_on_the_card(
    cohort, tmp_path, changes, alarms, option, why
):
    drawn = draw_set(tmp_path / "set", cohort, count=4)
    patches = PatchSet(drawn.folder, drawn.header.model_copy(update=changes))
    if alarms is not None:
        traced(patches, alarms)
    with pytest.raises(ConfigError, match=why):
        cs.release(patches, out=tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
    card = (cs.release(patches, out=tmp_path / "shared", **{option: True}) / "README.md").read_text()
    assert ("**Real tissue**" in card) == (option == "with_real_tissue")
    assert ("**Not traced**" in card) == (option == "untraced")


def test_a_trace_may_lie_elsewhere_and_must_be_there(cohort, tmp_path):
    patches = traced(draw_set(tmp_path / "set", cohort, count=4))
    (patches.folder / "trace").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"set/trace/trace\.json is missing.*give --trace FOLDER"):
        cs.release(patches, out=tmp_path / "shared")
    with pytest.raises(ConfigError, match=r"nowhere/trace\.json is missing"):
        cs.release(patches, out=tmp_path / "shared", trace=tmp_path / "nowhere", untraced=True)
    out = cs.release(patches, out=tmp_path / "shared", trace=tmp_path / "elsewhere")
    assert "Copies: none." in (out / "README.md").read_text()


def test_numbers_that_name_patients_are_searched_for_where_they_are_long_enough(cohort, tmp_path):
    patches = traced(draw_set(tmp_path / "set", cohort, count=4, seen=["20731", "17"]))
    with pytest.raises(MismatchError, match="its name would name 20731"):
        cs.release(patches, out=tmp_path / "patient-20731")
    card = (cs.release(patches, out=tmp_path / "shared-17") / "README.md").read_text()
    assert "Not searched for: names of fewer than 5 digits" in card


def test_other_sets_traces_names_and_folders_are_refused(cohort, tmp_path):
    patches = traced(draw_set(tmp_path / "set", cohort, count=4))
    with pytest.raises(MismatchError, match="its name would name p1"):
        cs.release(patches, out=tmp_path / "p1 and others")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        cs.release(patches, out=tmp_path / "there")
    with pytest.raises(InputError, match="lies in the set, which stays"):
        cs.release(patches, out=patches.folder / "inside")
    other = PatchSet(patches.folder, patches.header.model_copy(update={"seed": 7}))
    with pytest.raises(MismatchError, match="belongs to another set; trace this one again"):
        cs.release(other, out=tmp_path / "shared")
    (patches.folder / "trace" / "trace.json").write_text("[1]")
    with pytest.raises(MismatchError, match="belongs to another set"):
        cs.release(patches, out=tmp_path / "shared")
    held_out = PatchSet(patches.folder, patches.header.model_copy(update={"part": "test"}))
    with pytest.raises(InputError, match="drawn for test patients, for reading tests"):
        cs.release(held_out, out=tmp_path / "shared")
