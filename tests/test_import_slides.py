import json
import os
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml
from mirax import write_mirax
from PIL import Image

from counterstain.data import region_store
from counterstain.data.cohort import Cohort
from counterstain.data.split import SplitConfig, split_cohort
from counterstain.errors import CounterstainWarning, InputError, MismatchError
from counterstain.io import import_slides as module
from counterstain.io.annotations import FORMATS, looks_like, read_annotations
from counterstain.io.import_slides import import_slides, read_region
from counterstain.processes import ExecutorConfig
from counterstain.progress import silent
from counterstain.storage import read_json

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the real annotations in ../shared/data")
LABELS = "labels:\n  three: HER2 3+\n  one: HER2 1+\n  hole: background\n  smear: ignore\nregions: [ROI]\n"


def polygon(label: str, x: float, y: float, width: float, height: float) -> dict:
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    return {
        "type": "Feature",
        "id": f"{label}-{x}-{y}",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": label}},
    }


class Lab:
    """A folder of slides, one of annotations, LABELS.yaml, and the import of them."""

    def __init__(self, folder: Path) -> None:
        self.slides, self.annotations, self.out = folder / "slides", folder / "annotations", folder / "cohort"
        self.labels = folder / "LABELS.yaml"
        self.slides.mkdir()
        self.annotations.mkdir()
        self.labels.write_text(LABELS)

    def tiff(self, name: str, height: int = 400, width: int = 600) -> np.ndarray:
        image = np.random.default_rng([*name.encode()]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        resolution = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}  # 0.5 mpp
        tifffile.imwrite(self.slides / f"{name}.tif", image, photometric="rgb", **resolution)
        return image

    def mirax(self, name: str, image: np.ndarray) -> None:
        write_mirax(self.slides / f"{name}.mrxs", image, offset_xy=(1000, 520), mpp=0.5)

    def annotate(self, name: str, *features: dict) -> None:
        text = json.dumps({"type": "FeatureCollection", "features": features})
        (self.annotations / f"{name}.geojson").write_text(text)

    def load(self, **options) -> Cohort:
        settings = {"file_format": "qupath", "labels": self.labels, "mpp": 1.0, "out": self.out} | options
        return import_slides(self.slides, self.annotations, **settings)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def two_slides(lab: Lab) -> Lab:
    for name in ("a", "b"):
        lab.tiff(name)
        lab.annotate(
            name,
            polygon("ROI", 100, 50, 200, 160),
            polygon("ROI", 320, 200, 240, 180),
            polygon("three", 120, 60, 60, 40),
            polygon("one", 300, 180, 60, 60),
            polygon("hole", 130, 70, 10, 10),
            polygon("smear", 200, 100, 20, 20 + 2 * (name == "b")),
        )
    return lab


def test_regions_hold_the_pixels_and_the_instances_of_the_slide(two_slides: Lab):
    cohort = two_slides.load()
    assert list(cohort.regions["region"]) == ["a-region1", "a-region2", "b-region1", "b-region2"]
    image, instances = cohort.read(0)
    slide = tifffile.imread(two_slides.slides / "a.tif")[50:210, 100:300]
    assert np.array_equal(image, np.floor(slide.reshape(80, 2, 100, 2, 3).mean((1, 3)) + 0.5))
    expected = np.zeros((80, 100), int)
    expected[5:25, 10:40] = 1
    expected[10:15, 15:20] = 0
    expected[25:35, 50:60] = 4
    assert np.array_equal(instances, expected)
    assert cohort.subtypes(0) == {1: cohort.taxonomy.id_of("HER2 3+"), 4: 255}
    row = cohort.regions.iloc[1]
    assert (row["x_level0_px"], row["y_level0_px"], row["mpp_level0"]) == (320, 200, 0.5)
    assert (row["slide"], row["patient"], row["score"]) == ("a", "a", "HER2 1+")


def test_tables_and_pictures_show_what_was_imported_cut_and_left_out(two_slides: Lab):
    cohort = two_slides.load()
    report = read_json(cohort.folder / "import.json")
    assert report["subtypes"]["HER2 3+"] == {"instances": 2, "area_px": 1150, "area_mm2": 0.00115}
    assert report["subtypes"]["HER2 1+"]["instances"] == 2
    assert report["labels"] == {"ROI": 4, "hole": 2, "one": 2, "smear": 2, "three": 2}
    assert (report["regions"], report["background"], report["ignored"], report["cut_at_region_edge"]) == (4, 2, 2, 2)
    table = pd.read_parquet(cohort.folder / "annotations.parquet")
    assert table["annotation"].tolist()[:4] == ["three-120-60", "one-300-180", "hole-130-70", "smear-200-100"]
    picture = np.asarray(Image.open(cohort.folder / "overview" / "a.png"))
    assert picture.shape[1] > 600  # the legend stands beside the thumbnail
    assert tuple(picture[50, 110]) == (20, 20, 20)  # the frame of region1


@pytest.mark.parametrize(("origin", "shift"), [("canvas", (1000, 520)), ("bounds", (0, 0)), (None, (0, 0))])
def test_annotations_of_a_mirax_slide_count_from_the_origin_qupaths_by_default_from_the_scanned_area(
    lab: Lab, origin: str | None, shift: tuple[int, int]
):
    image = np.full((256, 320, 3), 240, np.uint8)
    image[64:128, 96:160] = (150, 90, 50)
    lab.mirax("a", image)
    lab.annotate("a", polygon("ROI", *shift, 320, 256), polygon("three", 96 + shift[0], 64 + shift[1], 64, 64))
    cohort = lab.load(origin=origin, mpp=1.0)
    pixels, instances = cohort.read(0)
    brown = np.abs(pixels.astype(int) - (150, 90, 50)).max(-1) < 5
    assert np.array_equal(brown, instances == 1)
    assert brown.sum() == 32 * 32
    assert tuple(cohort.regions.iloc[0][["x_level0_px", "y_level0_px"]]) == (1000, 520)


def test_annotations_off_the_slide_suggest_the_other_origin(lab: Lab):
    lab.mirax("a", np.full((256, 320, 3), 240, np.uint8))
    lab.annotate("a", polygon("ROI", 0, 0, 320, 256))
    words = r"slide a: 1 of 1 annotations lie off .*'ROI'.*begins at x 1000, y 520: try --origin bounds"
    with pytest.raises(InputError, match=words):
        lab.load(origin="canvas")
    assert not lab.out.exists()


@pytest.mark.parametrize("x", [700, -50])  # beside the slide, and touching its edge
def test_a_stray_annotation_off_the_slide_is_left_out_and_said_most_of_them_belong_to_another_slide(lab: Lab, x: int):
    lab.tiff("a")
    stray = polygon("three", x, 10, 50, 20)
    lab.annotate("a", polygon("three", 10, 10, 64, 64), stray)
    report = read_json(lab.load(regions="auto").folder / "import.json")
    assert (report["annotations"], report["off_the_slide"]) == (1, 1)
    assert report["odd"] == [f"slide a: 1 off the slide, the first: 'three', id three-{x}-10, at x {x}, y 10"]
    lab.annotate("a", polygon("three", 10, 10, 64, 64), stray, stray)
    with pytest.raises(InputError, match=r"2 of 3 .* off the slide's 600 x 400 px .*; they belong to another slide"):
        lab.load(regions="auto", out=lab.out / "again")


def test_a_stray_does_not_hide_that_the_other_origin_is_meant(lab: Lab):
    lab.mirax("a", np.full((256, 320, 3), 240, np.uint8))
    places = [polygon("three", 1010 + 20 * i, 530, 9, 9) for i in range(9)]
    lab.annotate("a", *places, polygon("three", 200, 100, 9, 9), polygon("three", 10**6, 9, 9, 9))
    with pytest.raises(InputError, match=r"10 of 11 annotations lie off .*: try --origin canvas"):
        lab.load(regions="auto", origin="bounds")
    assert read_json(lab.load(regions="auto", origin="canvas").folder / "import.json")["off_the_slide"] == 2


def test_detections_are_left_out_and_counted_unless_asked_for(lab: Lab):
    lab.tiff("a")
    detection = polygon("three", 20, 20, 9, 9)
    detection["properties"]["objectType"] = "detection"
    lab.annotate("a", polygon("three", 10, 10, 64, 64), detection, {**detection, "geometry": None})
    cohort = lab.load(regions="auto")
    assert len(cohort.instances) == 1
    report = read_json(cohort.folder / "import.json")
    assert report["skipped_by_file"] == {"a.geojson": {"detection (imported with --objects annotation,detection)": 2}}
    with pytest.raises(MismatchError):
        lab.load(regions="auto", objects=["annotation", "detection"])
    assert len(lab.load(regions="auto", objects=["annotation", "detection"], out=lab.out / "all").instances) == 2


def test_annotations_over_the_edge_of_the_slide_are_cut_and_counted(lab: Lab):
    lab.tiff("a")
    lab.annotate("a", polygon("ROI", 500, 300, 200, 200), polygon("three", 580, 380, 40, 40))
    cohort = lab.load(mpp=0.5)
    assert read_json(lab.out / "import.json")["cut_at_slide_edge"] == 1
    assert cohort.instances["area_px"].tolist() == [20 * 20]
    assert (cohort.read(0)[0][:, 100:] == 255).all()


def test_regions_are_placed_on_annotated_tissue(lab: Lab):
    lab.tiff("a", 1000, 1400)
    lab.annotate("a", polygon("three", 300, 200, 40, 40), polygon("one", 1000, 700, 30, 30))
    cohort = lab.load(regions="auto", region_size_um=100.0, regions_per_slide=5)
    assert list(cohort.regions["height_px"]) == [100, 100]
    assert read_json(lab.out / "import.json")["outside_of_regions"] == 0


def test_regions_come_from_a_table(two_slides: Lab, tmp_path: Path):
    table = tmp_path / "regions.csv"
    table.write_text(
        "slide,region,x_level0_px,y_level0_px,width_level0_px,height_level0_px\n"
        "a.tif,left,100,40,100,80\nb,,0,0,60,60\n"
    )
    cohort = two_slides.load(regions=table)
    assert list(cohort.regions["region"]) == ["a-left", "b-region1"]
    assert read_json(two_slides.out / "import.json")["regions_without_instance"] == 1


def test_patients_scores_and_resolutions_come_from_a_table(two_slides: Lab, tmp_path: Path):
    (tmp_path / "patients.csv").write_text("slide,patient,score,mpp_level0\na.tif,P1,3+,\nb,P1,0,0.25\n")
    with pytest.warns(CounterstainWarning, match=r"b.tif: the patients table's mpp_level0 0.25 overrules") as said:
        regions = two_slides.load(patients=tmp_path / "patients.csv").regions
    assert len(said) == 1
    assert set(regions["patient"]) == {"P1"}
    assert list(regions["score"]) == ["3+", "3+", "0", "0"]
    assert list(regions["mpp_level0"]) == [0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("slide,patient,mpp_level0\na,P1,0.5 um\nb,P1,\n", r"row 2: mpp_level0 '0.5 um': expected micrometres per"),
        ("slide,patient,mpp_level0\na,P1,0.5\nb,P1,0\n", r"row 3: mpp_level0 '0': expected micrometres per pixel"),
        ("slide,patient,mpp_level0\na,P1,90\nb,P1,\n", r"a\.\S+: the patients table's mpp_level0 90: expected 0.01 to"),
        ("slide,patient,mpp_level0\na,P1,0,5\nb,P1,0,5\n", r"patients.csv row 2: more values than the header has"),
        ("slide,patient\na,P1\n", r"patients.csv: no row for b; add one for every slide"),
        ("slide,who\na,P1\n", r"no column 'patient'; expected slide, patient and perhaps score"),
        ("slide,patient\na,P1\na,P2\nb,P3\n", r"row 3: slide a is listed twice"),
        ("slide,patient\na,\nb,P3\n", r"row 2: slide or patient is empty"),
        ("slide,patient,score\na,P1,1\nb,P3,1.0\n", r"scores '1' and '1\.0' are probably one; use one spelling"),
        (f"slide,patient\na,{'P' * 301}\nb,P3\n", "row 2: column 'patient' holds more than 300 characters"),
    ],
)
def test_a_table_of_patients_that_does_not_fit_is_one_line(two_slides: Lab, tmp_path: Path, content: str, words: str):
    (tmp_path / "patients.csv").write_text(content)
    with pytest.raises(InputError, match=words):
        two_slides.load(patients=tmp_path / "patients.csv")


def test_slides_and_annotations_that_do_not_match_are_listed_on_both_sides(lab: Lab):
    lab.tiff("a")
    lab.tiff("b")
    lab.annotate("a")
    lab.annotate("c", polygon("three", 5, 5, 9, 9))
    with pytest.raises(InputError, match=r"no annotations for b, no slide for c.geojson; give both"):
        lab.load()


@pytest.mark.parametrize(
    ("slide", "file", "words"),
    [("12", "12.1", "no slide for 12.1.geojson"), ("a", "A", r"capitals and small letters too \(A\.geojson for a\)")],
)
def test_a_file_of_another_number_or_case_belongs_to_no_slide(lab: Lab, slide: str, file: str, words: str):
    lab.tiff(slide)
    lab.annotate(file, polygon("three", 5, 5, 9, 9))
    with pytest.raises(InputError, match=words):
        lab.load()


def test_names_of_slides_and_annotations_are_compared_in_one_unicode_form(lab: Lab):
    lab.tiff(unicodedata.normalize("NFD", "Mü"))
    lab.annotate(unicodedata.normalize("NFC", "Mü"), polygon("ROI", 0, 0, 90, 90), polygon("three", 0, 0, 50, 50))
    assert lab.load().regions["slide"].tolist() == [unicodedata.normalize("NFC", "Mü")]


def test_a_second_annotation_file_of_a_slide_is_said_and_refused_where_it_repeats_outlines(lab: Lab):
    lab.tiff("a")
    lab.annotate("a", polygon("ROI", 0, 0, 90, 90), polygon("three", 0, 0, 50, 50))
    lab.annotate("a.more", polygon("one", 60, 0, 20, 50))
    with pytest.warns(CounterstainWarning, match=r"slide a has several files of annotations, a\.geojson, a\.more"):
        assert len(lab.load().instances) == 2
    lab.annotate("a.old", polygon("three", 0, 0, 50, 50), polygon("one", 0, 60, 20, 20))
    with (
        pytest.warns(CounterstainWarning, match="several files"),
        pytest.raises(InputError, match=r"slide a: a\.old\.geojson repeats 1 outlines of a\.geojson"),
    ):
        lab.load()


def test_one_slide_under_two_names_is_refused(two_slides: Lab):
    (two_slides.slides / "b.tif").write_bytes((two_slides.slides / "a.tif").read_bytes())
    with pytest.raises(InputError, match=r"b\.tif: is the same slide as a\.tif; remove one"):
        two_slides.load()


def test_one_slide_saved_twice_is_said_and_kept_in_one_part(two_slides: Lab):
    image = tifffile.imread(two_slides.slides / "a.tif")
    how = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", "compression": "deflate"}
    tifffile.imwrite(two_slides.slides / "b.tif", image, photometric="rgb", **how)
    with pytest.warns(
        CounterstainWarning, match=r"slide b: b\.tif of patient b is the same image as a\.tif of patient a"
    ):
        cohort = two_slides.load()
    with pytest.raises(InputError, match="patients a and b have the same image"):
        split_cohort(cohort, SplitConfig(train=1, val=1, test=0))


def test_regions_that_show_no_instance_at_all_are_an_error(lab: Lab):
    lab.tiff("a")
    lab.annotate("a", polygon("ROI", 300, 200, 90, 90), polygon("three", 0, 0, 50, 50))
    with pytest.raises(InputError, match="no region shows an instance of a subtype"):
        lab.load()
    assert not lab.out.exists()


def test_slides_that_would_be_two_spellings_of_a_patient_are_asked_about(lab: Lab, tmp_path: Path):
    for name in ("P1", "p01"):
        lab.tiff(name)
        lab.annotate(name, polygon("ROI", 0, 0, 90, 90), polygon("three", 0, 0, 50, 50))
    with pytest.raises(InputError, match=r"'P1' and 'p01' are probably one; give .* --patients"):
        lab.load()
    (tmp_path / "patients.csv").write_text("slide,patient\nP1,1.2E+11\np01,1.2E+11\n")
    with pytest.raises(InputError, match=r"row 2: column 'patient' is '1\.2E\+11', which programs write for"):
        lab.load(patients=tmp_path / "patients.csv")
    (tmp_path / "patients.csv").write_text("slide,patient\nP1,1\np01,1 \n")
    assert lab.load(patients=tmp_path / "patients.csv").patients("train") == []
    (tmp_path / "patients.csv").write_text("slide,patient\nP1,1\np01,1.0\n")
    with pytest.raises(InputError, match=r"'1' and '1\.0' are probably one; use one spelling"):
        lab.load(patients=tmp_path / "patients.csv")


def test_two_slides_of_a_patient_of_tcga_are_known_without_a_table(lab: Lab):
    for number in (1, 2):
        lab.tiff(f"TCGA-A1-A0SB-01Z-00-DX{number}.0a-1b")
        lab.annotate(
            f"TCGA-A1-A0SB-01Z-00-DX{number}.0a-1b", polygon("ROI", 0, 0, 90, 90), polygon("three", 0, 0, 9, 9)
        )
    with pytest.raises(InputError, match=r"DX1.*DX2.* are probably one; give their patients with"):
        lab.load()


def test_a_file_belongs_to_the_slide_with_the_longest_name_that_fits(lab: Lab):
    for slide, file, label in (("a", "a.qupath", "one"), ("a.2", "a.2.tif", "three")):
        lab.tiff(slide)
        lab.annotate(file, polygon("ROI", 0, 0, 40, 40), polygon(label, 5, 5, 9, 9))
    regions = lab.load().regions
    assert dict(zip(regions["slide"], regions["score"], strict=True)) == {"a": "HER2 1+", "a.2": "HER2 3+"}


def test_one_exact_file_holds_the_annotations_of_many_slides(lab: Lab, tmp_path: Path):
    rows = []
    for slide, label in (("a", "three"), ("b", "one")):
        lab.tiff(slide)
        for name, edge in (("ROI", 80), (label, 30)):
            kind = {"id": sum(name.encode()), "name": name, "vector_type": 1}
            vector = {"x1": 0, "y1": 0, "x2": edge, "y2": edge}
            image = {"id": 1, "name": f"{slide}.tif"}
            rows.append({"id": len(rows) + 1, "annotation_type": kind, "image": image, "vector": vector})
    lab.annotations = tmp_path / "exact.json"
    lab.annotations.write_text(json.dumps({"count": 4, "next": None, "results": rows}))
    assert list(lab.load(file_format="exact").regions["score"]) == ["HER2 3+", "HER2 1+"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("LABELS.yaml", "labels: {three: HER2 3+}\n", r"no meaning for label .*'ROI' \(4\)"),
        ("slides/b.tif", "not a slide", r"b.tif: not a slide that can be read"),
    ],
)
def test_what_cannot_be_imported_is_said_before_anything_is_written(
    two_slides: Lab, tmp_path: Path, file: str, content: str, words: str
):
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=words):
        two_slides.load()
    assert not two_slides.out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regions": "auto", "regions_per_slide": 0}, "regions_per_slide: Input should be greater than or equal to 1"),
        ({"origin": "corner"}, "origin: Input should be 'canvas' or 'bounds'"),
        ({"mpp": 0}, "mpp: Input should be greater than or equal to 0.01"),
        ({"mpp": 0.01, "regions": "auto"}, r"region region1 has 6e\+08 pixels at 0.01 mpp, more than 4e\+08"),
        ({"regions": Path("nowhere.csv")}, "nowhere.csv: no such file"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(two_slides: Lab, options: dict, words: str):
    with pytest.raises(InputError, match=words):
        two_slides.load(**options)


def test_a_slide_without_a_region_is_an_error(lab: Lab):
    lab.tiff("a")
    lab.annotate("a", polygon("three", 5, 5, 9, 9))
    with pytest.raises(InputError, match=r"slide a: no region; none of its annotations has a label of a region"):
        lab.load()
    lab.annotate("a", polygon("smear", 5, 5, 9, 9))
    with pytest.raises(InputError, match=r"no slide has an instance of a subtype, so no region can be placed"):
        lab.load(regions="auto")


def test_a_slide_without_an_instance_is_counted_where_regions_are_placed_and_others_imported(lab: Lab):
    for name, label in (("a", "three"), ("b", "smear"), ("c", "three")):
        lab.tiff(name)
        lab.annotate(name, polygon(label, 60, 60, 90, 90))
    cohort = lab.load(regions="auto")
    report = read_json(cohort.folder / "import.json")
    assert cohort.regions["slide"].tolist() == ["a", "c"]
    assert (report["slides"], report["slides_without_region"]) == (2, ["b"])
    assert lab.load(regions="auto").regions.equals(cohort.regions)


def test_a_slide_whose_objects_were_left_out_is_named(lab: Lab):
    detection = polygon("three", 5, 5, 9, 9)
    detection["properties"]["objectType"] = "detection"
    for name, feature in (("a", polygon("three", 0, 0, 50, 50)), ("b", detection)):
        lab.tiff(name)
        lab.annotate(name, polygon("ROI", 0, 0, 90, 90), feature)
    said = r"slide b has no instance of a subtype, but b\.geojson has 1 x detection \(imported with --objects .*"
    assert re.fullmatch(said, *read_json(lab.load().folder / "import.json")["odd"])


def test_an_outline_drawn_twice_with_two_meanings_is_counted_and_named(lab: Lab):
    lab.tiff("a")
    ring = polygon("one", 20, 20, 30, 30)
    ring["geometry"]["coordinates"][0] = [*ring["geometry"]["coordinates"][0][1:], [50, 20]]
    lab.annotate("a", polygon("ROI", 0, 0, 90, 90), polygon("three", 20, 20, 30, 30), ring)
    cohort = lab.load()
    report = read_json(cohort.folder / "import.json")
    assert report["outlines_of_two_classes"] == 1
    assert report["odd"] == ["slide a: one outline twice, 'three' and 'one' at x 20, y 20; the later shows"]
    assert cohort.instances["subtype"].tolist() == [cohort.taxonomy.id_of("HER2 1+")]


def test_annotations_copied_to_another_slide_are_said(two_slides: Lab):
    a = two_slides.annotations / "a.geojson"
    (two_slides.annotations / "b.geojson").write_text(a.read_text().replace(", ", ","))
    with pytest.warns(CounterstainWarning, match="have the same outlines as another: b as a; was a file of"):
        two_slides.load()


def test_an_interrupted_import_goes_on_and_ends_the_same(two_slides: Lab, tmp_path: Path, monkeypatch):
    whole = two_slides.load(out=tmp_path / "whole")
    written = []

    def killed_once(*arguments):
        written.append(1)
        if len(written) == 3:
            raise KeyboardInterrupt
        return read_region(*arguments)

    monkeypatch.setattr(module, "read_region", killed_once)
    with pytest.raises(KeyboardInterrupt):
        two_slides.load()
    with pytest.raises(InputError, match="interrupted"):
        Cohort.open(two_slides.out)
    bars = []
    cohort = two_slides.load(progress=lambda *words: bars.append(words) or silent(*words))
    assert len(written) == 5  # the third region twice
    assert bars == [("regions, 2 of them from before", 4)]
    assert cohort.fingerprint == whole.fingerprint
    for name in ("import.json", "annotations.parquet", "overview/b.png"):
        assert (two_slides.out / name).read_bytes() == (whole.folder / name).read_bytes()
    assert all(np.array_equal(cohort.read(i)[0], whole.read(i)[0]) for i in range(4))


def test_tiles_outside_of_regions_are_not_decoded(lab: Lab, tmp_path: Path):
    image = np.full((3200, 3200, 3), 245, np.uint8)
    image[900:2100, 700:1900] = (200, 120, 160)
    path, how = lab.slides / "a.tif", {"tile": (256, 256), "compression": "deflate", "photometric": "rgb"}
    with tifffile.TiffWriter(path) as file:
        for level in (image, image[::2, ::2]):
            file.write(level, subfiletype=int(level is not image), resolution=(2e4, 2e4), resolutionunit=3, **how)
    lab.annotate("a", polygon("three", 800, 1000, 900, 800))
    labels = tmp_path / "labels.yaml"
    labels.write_text("labels: {three: HER2 3+}\n")
    settings = {"labels": labels, "regions": "auto", "region_size_um": 512.0, "regions_per_slide": 1}
    whole = lab.load(out=tmp_path / "whole", **settings)
    x, y = whole.regions.iloc[0][["x_level0_px", "y_level0_px"]]
    with tifffile.TiffFile(path) as file:
        places = list(zip(file.pages[0].dataoffsets, file.pages[0].databytecounts, strict=True))
    data = bytearray(path.read_bytes())
    for tile, (start, length) in enumerate(places):
        row, column = divmod(tile, 13)
        beside = not (x - 256 < 256 * column < x + 1024 and y - 256 < 256 * row < y + 1024)
        if beside and tile:  # a pixel of the first tile is read when a slide is opened
            data[start : start + length] = bytes(length)
    path.write_bytes(data)
    assert np.array_equal(lab.load(**settings).read(0)[0], whole.read(0)[0])


@pytest.mark.slow
def test_two_processes_import_the_same_cohort_to_the_byte(two_slides: Lab, tmp_path: Path):
    one = two_slides.load(out=tmp_path / "one").folder
    two_slides.load(executor=ExecutorConfig(processes=2))
    files = {file.relative_to(one) for file in one.rglob("*") if file.is_file()}
    assert files == {file.relative_to(two_slides.out) for file in two_slides.out.rglob("*") if file.is_file()}
    assert [str(f) for f in files if (one / f).read_bytes() != (two_slides.out / f).read_bytes()] == []


def replace_slide(lab: Lab, name: str) -> None:
    """Write another slide of the same size under the name, with the time of the first."""
    path = lab.slides / f"{name}.tif"
    about, data = path.stat(), bytearray(path.read_bytes())
    data[-1000:] = bytes(1000)
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("finished", [True, False])
def test_a_slide_replaced_by_another_of_its_name_and_size_is_noticed(two_slides: Lab, monkeypatch, finished: bool):
    if finished:
        two_slides.load()
    else:
        monkeypatch.setattr(module, "read_region", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            two_slides.load()
    replace_slide(two_slides, "b")
    with pytest.raises(MismatchError, match=r"slide b: b.tif is not the file that .* its content differs"):
        two_slides.load()


def test_a_slide_that_is_only_touched_can_be_given_its_time_back(two_slides: Lab):
    two_slides.load()
    path = two_slides.slides / "a.tif"
    before = path.stat().st_mtime_ns
    os.utime(path, ns=(0, 0))
    with pytest.raises(MismatchError, match=r"the time of its last change differs") as error:
        two_slides.load()
    seconds, rest = str(error.value).split("touch -d @")[1].split()[0].split(".")
    assert int(seconds) * 10**9 + int(rest) == before


def test_a_slide_replaced_while_it_is_read_is_noticed(two_slides: Lab, monkeypatch):
    def replaced_meanwhile(*arguments):
        replace_slide(two_slides, "a")
        return read_region(*arguments)

    monkeypatch.setattr(module, "read_region", replaced_meanwhile)
    with pytest.raises(MismatchError, match=r"slide a: a.tif is not the file"):
        two_slides.load()


def test_another_import_into_the_same_folder_is_refused(two_slides: Lab):
    two_slides.load()
    assert len(two_slides.load()) == 4
    with pytest.raises(MismatchError, match=r"mpp was 1.0, now 2.0"):
        two_slides.load(mpp=2.0)


@pytest.mark.parametrize("name", ["HER2 O", "her2 0", "LCIS / DCIS"])
def test_a_misspelt_subtype_of_her2_makes_no_taxonomy_of_its_own(two_slides: Lab, name: str):
    two_slides.labels.write_text(LABELS.replace("HER2 3+", name))
    with pytest.raises(InputError, match=r"none of HER2's subtypes; did you mean '(HER2 0|LCIS/DCIS)'"):
        two_slides.load()


def test_subtypes_that_her2_does_not_have_make_a_taxonomy_of_their_own(two_slides: Lab):
    two_slides.labels.write_text(LABELS.replace("HER2 3+", "Gleason 4").replace("HER2 1+", "Gleason 3"))
    assert two_slides.load().taxonomy.names == ("Gleason 4", "Gleason 3")


def test_large_regions_are_streamed_into_their_pack(lab: Lab, monkeypatch):
    monkeypatch.setattr(region_store, "SHARD_BYTES", 1000)
    monkeypatch.setattr(region_store, "CHUNK_PX", 64)
    image = lab.tiff("a")
    lab.annotate("a", polygon("ROI", 0, 0, 600, 400), polygon("three", 100, 100, 300, 200))
    pixels, instances = lab.load(mpp=0.5).read(0)
    assert np.array_equal(pixels, image)
    assert (instances == 1).sum() == 300 * 200


def write_blank(path: Path, width: int, height: int) -> None:
    """Write a white pyramid of any size in few bytes: one tile, the others absent."""
    white = zlib.compress(bytes([255]) * (3 * 1024 * 1024))
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for shift in (0, 2, 4, 6):
            w, h = width >> shift, height >> shift
            absent = -(-w // 1024) * -(-h // 1024) - 1
            file.write(
                iter([white] + [b""] * absent), shape=(h, w, 3), dtype=np.uint8, tile=(1024, 1024),
                compression="deflate", photometric="rgb", subfiletype=int(shift > 0),
                resolution=(40_000, 40_000), resolutionunit="CENTIMETER",
            )  # fmt: skip


@needs_real
@pytest.mark.parametrize("file", sorted((REAL / "annotations").glob("*")), ids=lambda file: file.name)
def test_real_annotation_files_import_against_a_blank_slide(lab: Lab, file: Path):
    file_format = looks_like(file.read_bytes())
    assert file_format in FORMATS
    annotations = read_annotations(file, file_format)
    right, bottom = np.max([a.polygon.bounds[2:] for a in annotations.annotations], axis=0).astype(int).tolist()
    write_blank(lab.slides / f"{file.name.split('.', maxsplit=1)[0]}.tif", right + 500, bottom + 500)
    meanings = {label: f"kind {i % 3}" for i, label in enumerate(annotations.labels)}
    lab.labels.write_text(yaml.safe_dump({"labels": meanings}))
    lab.annotations = file
    cohort = lab.load(file_format=file_format, mpp=4.0, regions="auto", regions_per_slide=3)
    assert len(cohort.instances) > 0
    assert (cohort.read(0)[0] == 255).all()
    assert read_json(lab.out / "import.json")["annotations"] == len(annotations.annotations)
