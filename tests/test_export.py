import itertools
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from drawn_cohort import HER2, draw_cohort, draw_set, store
from PIL import Image

from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import label_mask
from counterstain.data.pseudonyms import pseudonyms
from counterstain.data.region_store import Region
from counterstain.data.split import check_no_leak, patient_key
from counterstain.errors import CounterstainWarning, InputError, LeakageError, MismatchError
from counterstain.io import exports as module
from counterstain.io.export_contents import file_names
from counterstain.io.export_viewers import Labels, write_ome_tiff, write_store
from counterstain.io.exports import ExportConfig, export
from counterstain.io.import_images import import_dataset, import_table
from counterstain.io.import_slides import import_slides
from counterstain.io.slides import Slide
from counterstain.taxonomy import IGNORE, Taxonomy

PNG, NNUNET, HF, PARQUET, QUPATH, STORES = (
    ExportConfig(file_format=name) for name in ("png", "nnunet", "hf", "huggingface", "qupath", "ome-zarr")
)


@pytest.fixture(autouse=True)
def _key_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("COUNTERSTAIN_PATIENT_KEY", str(tmp_path_factory.getbasetemp() / "patient-key"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_set(folder / "set", draw_cohort(folder / "cohort"), count=8)
    return folder


@pytest.fixture
def cohort(drawn) -> Cohort:
    return Cohort.open(drawn / "cohort")


@pytest.fixture
def synthetic(drawn) -> PatchSet:
    return PatchSet.open(drawn / "set")


def draw_odd_cohort(folder) -> Cohort:
    """One region with an ignored instance and a number beyond 16 bits, its name unfit for a file."""
    instances = np.zeros((20, 30), np.int32)
    instances[2:6, 2:6], instances[10:15, 3:9], instances[3:8, 20:25] = 70_000, 5, 9
    return write_region(folder, "a/b: 1", instances, {70_000: 2, 5: IGNORE, 9: 5})


def write_region(folder, name, instances, subtypes, taxonomy=HER2) -> Cohort:
    image = np.full((*instances.shape, 3), 77, np.uint8)
    region = Region(region=name, slide="s", patient="p", image=image, instances=instances, subtypes=subtypes)
    return store(folder, region, mpp=0.25, taxonomy=taxonomy)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def masks(cohort: Cohort) -> dict[str, np.ndarray]:
    return {
        str(name): label_mask(cohort.read(position)[1], cohort.subtypes(position))
        for position, name in enumerate(cohort.regions["region"])
    }


def import_back(out, into, mpp: float = 0.5) -> Cohort:
    taxonomy = Taxonomy.load(out / "taxonomy.yaml")
    return import_table(out / "table.csv", mpp=mpp, out=into, labels="ids", taxonomy=taxonomy)


# Ordinary images


def test_what_is_exported_and_imported_again_has_the_same_masks_images_and_split(cohort, tmp_path):
    assert export(cohort.folder, tmp_path / "png", PNG) == len(cohort)
    again = import_back(tmp_path / "png", tmp_path / "again")
    before, after = masks(cohort), masks(again)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    order = again.regions.set_index("region").loc[cohort.regions["region"]]
    assert order["split"].tolist() == cohort.regions["split"].tolist()
    assert order["patient"].tolist() == cohort.regions["patient"].tolist()
    assert np.array_equal(again.read(0)[0], cohort.read(0)[0])
    assert again.taxonomy == cohort.taxonomy


def test_instances_are_kept_apart_in_16_bits(cohort, tmp_path):
    export(cohort.folder, tmp_path, PNG)
    stored = pixels(tmp_path / "instances" / "p0-0.png")
    assert stored.dtype == np.uint16
    assert np.array_equal(stored, cohort.read(0)[1])
    table = pd.read_csv(tmp_path / "instances.csv")
    mine = table[table["image"] == "images/p0-0.png"].set_index("instance")
    assert dict(mine["subtype_id"]) == cohort.subtypes(0)
    assert mine.loc[1, "subtype"] == HER2.name_of(cohort.subtypes(0)[1])
    assert mine["area_px"].sum() == (stored > 0).sum()


def test_odd_names_and_ignored_pixels_come_back_and_numbers_beyond_16_bits_become_ranks(tmp_path):
    cohort = draw_odd_cohort(tmp_path / "cohort")
    export(cohort.folder, tmp_path / "png", PNG)
    again = masks(import_back(tmp_path / "png", tmp_path / "again", mpp=0.25))
    assert np.array_equal(again["a/b: 1"], masks(cohort)["a/b: 1"])
    (path,) = (tmp_path / "png" / "instances").iterdir()
    table = pd.read_csv(tmp_path / "png" / "instances.csv").set_index("instance")
    assert dict(table["subtype"]) == {1: "ignore", 2: "LCIS/DCIS", 3: "HER2 1+"}
    assert np.bincount(pixels(path).ravel())[1:].tolist() == table.sort_index()["area_px"].tolist()


def test_more_instances_than_png_can_number_are_refused(tmp_path):
    instances = np.arange(1, 264 * 265 + 1, dtype=np.int32).reshape(264, 265)
    cohort = write_region(tmp_path / "cohort", "a", instances, dict.fromkeys(range(1, instances.size + 1), 1))
    with pytest.raises(InputError, match="region a: has 69,960 instances, PNG holds 65,535; import smaller regions"):
        export(cohort.folder, tmp_path / "png", PNG)


def test_all_subtypes_may_become_one_label(cohort, tmp_path):
    export(cohort.folder, tmp_path, ExportConfig(file_format="png", labels="tumour"))
    assert Taxonomy.load(tmp_path / "taxonomy.yaml").names == ("tumour",)
    assert np.array_equal(pixels(tmp_path / "labels" / "p0-0.png"), masks(cohort)["p0-0"] > 0)


def test_a_synthetic_set_is_exported_with_its_sources(synthetic, tmp_path):
    assert export(synthetic.folder, tmp_path / "png", PNG) == 8
    again = import_back(tmp_path / "png", tmp_path / "again")
    assert np.array_equal(masks(again)["000002"], synthetic[2].label_mask)
    table, source = pd.read_csv(tmp_path / "png" / "table.csv"), synthetic[1].source
    assert table["part"].tolist() == ["train"] * 8
    found = table[["source_region", "patient", "y_px", "x_px"]].iloc[1].tolist()
    assert found == [source.region, source.patient, source.y_px, source.x_px]


def test_who_is_behind_generated_images_comes_back_with_them(synthetic, cohort, tmp_path):
    export(synthetic.folder, tmp_path / "png", PNG)
    (tmp_path / "png" / "patients_seen.txt").write_text("p0\np1\np2\nseen by the generator\n")
    again = import_back(tmp_path / "png", tmp_path / "again")
    assert again.patients("train") == ["p0", "p1", "p2", "seen by the generator"]
    export(again.folder, tmp_path / "twice", PNG)
    assert "seen by the generator" in (tmp_path / "twice" / "patients_seen.txt").read_text()
    export(cohort.folder, tmp_path / "real", PNG)
    assert not (tmp_path / "real" / "patients_seen.txt").exists()


def test_an_export_that_is_killed_before_its_table_has_said_who_is_behind_it(synthetic, tmp_path, monkeypatch):
    unable = replace(module.LAYOUTS["png"], write_tables=lambda *_: pytest.fail("killed"))
    monkeypatch.setitem(module.LAYOUTS, "png", unable)
    with pytest.raises(pytest.fail.Exception, match="killed"):
        export(synthetic.folder, tmp_path, PNG)
    assert (tmp_path / "patients_seen.txt").read_text() == "p0\np1\np2\n"


def test_styles_of_generated_images_are_exported(cohort, tmp_path):
    synthetic = draw_set(tmp_path / "set", cohort, count=1, style=(("a", 0.25), ("b", 0.75)))
    for config in (PNG, HF):
        export(synthetic.folder, tmp_path / config.file_format, config)
    row = pd.read_csv(tmp_path / "png" / "table.csv").iloc[0]
    line = json.loads((tmp_path / "hf" / "train" / "metadata.jsonl").read_text())
    for column, expected in {"style_slides": ["a", "b"], "style_weights": [0.25, 0.75]}.items():
        assert json.loads(row[column]) == line[column] == expected


def test_file_names_are_safe_and_differ_where_case_does_not_count():
    names = file_names(["plain", "a/b", "a_b", "Same", "same", "..", "x" * 300])
    assert names[0] == "plain"
    assert len({name.lower() for name in names}) == len(names)
    assert not any("/" in name or name.startswith(".") or len(name) > 110 for name in names)


# nnU-Net


def test_a_dataset_of_nnunet_has_its_folders_its_labels_and_its_split(cohort, tmp_path):
    out = tmp_path / "Dataset007_Drawn"
    export(cohort.folder, out, NNUNET)
    described = json.loads((out / "dataset.json").read_text())
    assert described["numTraining"] == 8
    assert described["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    assert described["labels"] == {"background": 0, **{s.name: s.id for s in HER2.subtypes}}
    assert sorted(p.name for p in (out / "imagesTs").iterdir()) == ["p4-0_0000.png", "p4-1_0000.png"]
    assert np.array_equal(pixels(out / "labelsTr" / "p0-0.png"), masks(cohort)["p0-0"])
    (fold,) = json.loads((out / "splits_final.json").read_text())
    assert fold["val"] == ["p3-0", "p3-1"]
    assert len(fold["train"]) == 6


def test_ignore_is_the_highest_label_of_nnunet(tmp_path):
    cohort = draw_odd_cohort(tmp_path / "cohort")
    export(cohort.folder, tmp_path / "Dataset001_odd", NNUNET)
    (label,) = (tmp_path / "Dataset001_odd" / "labelsTr").iterdir()
    assert sorted(np.unique(pixels(label))) == [0, 2, 5, 6]
    labels = json.loads((tmp_path / "Dataset001_odd" / "dataset.json").read_text())["labels"]
    assert labels["ignore"] == 6
    assert not (tmp_path / "Dataset001_odd" / "splits_final.json").exists()


def test_without_a_validation_part_folds_are_made_by_patient(synthetic, tmp_path):
    export(synthetic.folder, tmp_path / "Dataset002_set", NNUNET)
    folds = json.loads((tmp_path / "Dataset002_set" / "splits_final.json").read_text())
    patients = {f"{index:06d}": patch.source.patient for index, patch in enumerate(synthetic)}
    assert len(folds) == len(set(patients.values())) > 1
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(patients)
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(patients)
        assert {patients[n] for n in fold["train"]}.isdisjoint(patients[n] for n in fold["val"])


def test_nnunets_own_check_accepts_the_dataset(cohort, tmp_path):
    reason = "nnunetv2 is not installed"
    check = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity", reason=reason)
    out = tmp_path / "Dataset007_Drawn"
    export(cohort.folder, out, NNUNET)
    check.verify_dataset_integrity(str(out), num_processes=1)


# Hugging Face


def test_an_image_folder_has_a_line_of_metadata_for_every_image(cohort, tmp_path):
    export(cohort.folder, tmp_path, HF)
    lines = (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 6
    first = json.loads(lines[0])
    assert np.array_equal(pixels(tmp_path / "train" / first["file_name"]), cohort.read(0)[0])
    assert np.array_equal(pixels(tmp_path / "train" / first["mask_file_name"]), masks(cohort)["p0-0"])
    assert first["patient"] == "p0"
    assert sum(first["subtype_instances"].values()) == 9
    assert sum(first["subtype_area_px"].values()) == (cohort.read(0)[1] > 0).sum()
    assert (tmp_path / "validation" / "metadata.jsonl").exists()


def test_the_datasets_library_reads_the_image_folder(cohort, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    export(cohort.folder, tmp_path / "hf", HF)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 6, "validation": 2, "test": 2}
    assert np.array_equal(np.asarray(loaded["train"][0]["mask"]), masks(cohort)["p0-0"])


def load(folder, cache):
    return pytest.importorskip("datasets").load_dataset(str(folder), cache_dir=str(cache))


def test_datasets_loads_parquet_files_with_their_masks_and_counts(cohort, tmp_path):
    export(cohort.folder, tmp_path / "hf", PARQUET)
    loaded = load(tmp_path / "hf", tmp_path / "cache")
    assert {name: len(part) for name, part in loaded.items()} == {"train": 6, "validation": 2, "test": 2}
    first, (image, instances) = loaded["train"][0], cohort.read(0)
    assert np.array_equal(np.asarray(first["image"]), image)
    assert np.array_equal(np.asarray(first["mask"]), masks(cohort)["p0-0"])
    assert np.array_equal(np.asarray(first["instances"]), instances)
    assert (first["mpp"], first["number"]) == (0.5, 0)
    subtypes = list(cohort.subtypes(0).values())
    assert first["subtype_instances"] == {s.name: subtypes.count(s.id) for s in HER2.subtypes}
    assert sum(first["subtype_area_px"].values()) == (instances > 0).sum()


def test_a_dataset_card_counts_subtypes_and_patients_and_nothing_names_a_patient(synthetic, tmp_path):
    export(synthetic.folder, tmp_path / "hf", PARQUET, facts={"Generator": "none"})
    card = (tmp_path / "hf" / "README.md").read_text()
    found = (synthetic.instances["subtype"] == 4).sum()
    assert f"| 4 | HER2 3+ | {found} |" in card
    assert "| Generator | none |\n| licence | **fill in**" in card
    assert "| patients behind generated images | 3 |" in card
    rows = load(tmp_path / "hf", tmp_path / "cache")["train"].select_columns(["patient"])
    assert all(row["patient"].startswith("pseudonym:") for row in rows)
    assert not {"p0", "p1", "p2"} & set((tmp_path / "hf" / "patients_seen.txt").read_text().split())
    (tmp_path / "hf" / "README.md").write_text("filled in")
    assert export(synthetic.folder, tmp_path / "hf", PARQUET, facts={"Generator": "none"}) == 8
    assert (tmp_path / "hf" / "README.md").read_text() == "filled in"


def test_pseudonyms_of_pseudonyms_are_the_same():
    hidden = pseudonyms(f"patient {number}" for number in range(50))
    assert pseudonyms(map(patient_key, hidden)) == hidden


def test_the_card_of_a_set_says_how_it_was_drawn(run, synthetic, tmp_path):
    status, printed, _ = run("export", synthetic.folder, "--format", "huggingface", "--out", tmp_path / "hf")
    assert status == 0
    assert "fill in the licence" in printed
    assert "| Method | The phantom's own renderer |" in (tmp_path / "hf" / "README.md").read_text()


def test_parquet_files_are_imported_again_and_their_patients_are_recognised(synthetic, cohort, tmp_path):
    export(synthetic.folder, tmp_path / "hf", PARQUET)
    again = import_dataset(tmp_path / "hf", out=tmp_path / "again")
    assert np.array_equal(again.read(2)[0], synthetic[2].image)
    assert np.array_equal(masks(again)[again.regions["region"][2]], synthetic[2].label_mask)
    with pytest.raises(LeakageError, match="the set has seen p0"):
        check_no_leak(again.source["patients_seen"], cohort, "the set", splits=["train"])


def test_a_parquet_file_that_is_cut_short_is_written_again(cohort, tmp_path):
    export(cohort.folder, tmp_path / "hf", PARQUET)
    whole, cut = contents(tmp_path / "hf"), next((tmp_path / "hf" / "data").glob("train-*"))
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.warns(CounterstainWarning, match="1 files are missing or cut short"):
        export(cohort.folder, tmp_path / "hf", PARQUET)
    assert contents(tmp_path / "hf") == whole


# QuPath


def import_from_qupath(project, into, outlines="outlines", mpp: float = 0.5) -> Cohort:
    return import_slides(
        project / "images", project / outlines, file_format="qupath", labels=project / "LABELS.yaml",
        taxonomy=Taxonomy.load(project / "taxonomy.yaml"), patients=project / "patients.csv",
        regions=project / "regions.csv", mpp=mpp, out=into,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:slides that have the same outlines")
def test_outlines_of_a_qupath_project_come_back_as_the_same_instances(cohort, tmp_path):
    export(cohort.folder, tmp_path / "project", QUPATH)
    again = import_from_qupath(tmp_path / "project", tmp_path / "again")
    order = [again.regions["region"].tolist().index(f"{name}-whole") for name in cohort.regions["region"]]
    for position, found in enumerate(order):
        for one, other in zip(cohort.read(position), again.read(found), strict=True):
            assert np.array_equal(one, other)
        assert cohort.subtypes(position) == again.subtypes(found)
    assert again.regions["patient"].iloc[order].tolist() == cohort.regions["patient"].tolist()
    assert again.taxonomy == cohort.taxonomy


@pytest.mark.parametrize("seed", range(5))
def test_whatever_its_shape_an_instance_comes_back_from_its_outline(tmp_path, seed):
    rng = np.random.default_rng(seed)
    instances = np.kron(rng.integers(0, 5, (20, 30)), np.ones((1 + seed % 3, 1), int)).astype(np.int32)
    instances[0, :5] = 7  # of one row, at the edge
    subtypes = {i: 1 + i % 5 for i in np.unique(instances).tolist() if i} | {3: IGNORE}
    cohort = write_region(tmp_path / "cohort", "a: b", instances, subtypes)
    export(cohort.folder, tmp_path / "project", QUPATH)
    again = import_from_qupath(tmp_path / "project", tmp_path / "again", mpp=0.25)
    expected, found = masks(cohort)["a: b"], next(iter(masks(again).values()))
    assert np.array_equal(expected, found)


def test_outlines_that_were_edited_are_imported_with_their_new_class(cohort, tmp_path):
    project = tmp_path / "project"
    export(cohort.folder, project, QUPATH)
    (project / "edited").mkdir()
    for file in (project / "outlines").iterdir():
        content = json.loads(file.read_text())
        for feature in content["features"]:
            feature["properties"]["classification"] = {"name": "HER2 3+", "color": [140, 45, 4]}
        (project / "edited" / file.name).write_text(json.dumps(content))
    with pytest.warns(CounterstainWarning, match="same outlines"):
        again = import_from_qupath(project, tmp_path / "again", "edited")
    assert set(again.instances["subtype"]) == {4}
    assert export(cohort.folder, project, QUPATH) == len(cohort)  # which leaves what QuPath and its scripts wrote


def test_a_project_lists_images_and_classes_as_qupath_does(cohort, tmp_path):
    export(cohort.folder, tmp_path, QUPATH)
    project = json.loads((tmp_path / "project.qpproj").read_text())
    assert project["uri"] == (tmp_path / "project.qpproj").as_uri()
    assert [image["imageName"] for image in project["images"]] == cohort.regions["region"].tolist()
    assert [image["entryID"] for image in project["images"]] == list(range(1, 1 + project["lastID"]))
    assert project["images"][0]["serverBuilder"]["uri"] == (tmp_path / "images" / "p0-0.ome.tif").as_uri()
    classes = json.loads((tmp_path / "classifiers" / "classes.json").read_text())["pathClasses"]
    assert [c["name"] for c in classes] == [*HER2.names, "Ignore*"]
    assert classes[3]["color"] == 0xFF8C2D04 - 2**32
    features = json.loads((tmp_path / "outlines" / "p0-0.geojson").read_text())["features"]
    assert features[0]["properties"]["objectType"] == "annotation"
    drawn = {f["properties"]["classification"]["name"]: f["properties"]["classification"]["color"] for f in features}
    assert all(HER2.palette[HER2.id_of(name)].tolist() == colour for name, colour in drawn.items())


@pytest.mark.filterwarnings("ignore:slides that have the same outlines")
def test_who_is_behind_generated_images_comes_back_from_qupath_too(synthetic, tmp_path):
    export(synthetic.folder, tmp_path / "project", QUPATH)
    again = import_from_qupath(tmp_path / "project", tmp_path / "again")
    assert again.patients("train") == ["p0", "p1", "p2"]


def test_a_class_that_qupath_would_take_for_two_is_refused(tmp_path):
    taxonomy = Taxonomy(name="t", subtypes=({"id": 1, "name": "tumour: in situ", "colour": "#ff0000"},))
    write_region(tmp_path / "cohort", "a", np.ones((8, 8), np.int32), {1: 1}, taxonomy)
    with pytest.raises(InputError, match="QuPath takes 'tumour: in situ' for a class within a class; rename"):
        export(tmp_path / "cohort", tmp_path / "out", QUPATH)


def test_large_images_have_levels_that_begin_with_the_image_itself(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (2100, 2300, 3), np.uint8)
    write_ome_tiff(tmp_path / "a.ome.tif", image, 0.25)
    with Slide.open(tmp_path / "a.ome.tif") as slide:
        assert slide.mpp_level0 == 0.25
        assert np.array_equal(slide.read(0, 0, 2300, 2100, 0.25), image)
        assert np.abs(slide.read(0, 0, 4, 4, 0.5) - image[:8, :8].reshape(4, 2, 4, 2, 3).mean((1, 3))).max() <= 0.5
    first = (tmp_path / "a.ome.tif").read_bytes()
    write_ome_tiff(tmp_path / "a.ome.tif", image, 0.25)
    assert (tmp_path / "a.ome.tif").read_bytes() == first


# OME-Zarr


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ome_zarr|zarr|dask")
def test_the_reader_of_ome_zarr_opens_images_with_labels_in_the_colours_of_their_subtypes(synthetic, tmp_path):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    export(synthetic.folder, tmp_path, STORES)
    image, _, instances, subtypes = Reader(parse_url(tmp_path / "000002.ome.zarr"))()
    patch = synthetic[2]
    assert np.array_equal(np.moveaxis(np.asarray(image.data[0]), 0, -1), patch.image)
    assert np.array_equal(np.asarray(instances.data[0]), patch.instances)
    assert np.array_equal(np.asarray(subtypes.data[0]), patch.label_mask)
    assert image.metadata["coordinateTransformations"][0][0]["scale"] == [1, 0.5, 0.5]
    instance, subtype = next(iter(patch.subtypes.items()))
    assert instances.metadata["properties"][instance]["subtype"] == HER2.name_of(subtype)
    expected = [*(HER2.palette[subtype] / 255), 1.0]
    assert instances.metadata["color"][instance] == subtypes.metadata["color"][subtype] == pytest.approx(expected)
    assert pd.read_csv(tmp_path / "table.csv")["image"].tolist() == [f"{i:06d}.ome.zarr" for i in range(8)]


def test_the_models_of_the_ome_zarr_specification_accept_images_and_labels(tmp_path):
    from ome_zarr_models.v05 import Image as ImageModel
    from ome_zarr_models.v05.image_label import ImageLabel

    image = np.random.default_rng(0).integers(0, 255, (1100, 2300, 3), np.uint8)
    marked = np.zeros((1100, 2300), np.int32)
    marked[500:900, 1000:1801] = 3
    labels = Labels("found", marked, "int32", {3: {"class": "tumour"}}, {3: (200, 0, 0)})
    write_store(tmp_path / "a.ome.zarr", image, [labels], name="a", mpp=0.5)
    root = zarr.open_group(tmp_path / "a.ome.zarr", mode="r")
    ImageModel.from_zarr(root)
    ImageLabel.from_zarr(root["labels/found"])
    assert [root[str(level)].shape for level in range(3)] == [(3, 1100, 2300), (3, 550, 1150), (3, 275, 575)]
    assert np.array_equal(root["labels/found/1"][:], marked[::2, ::2])
    means = np.floor(image.reshape(550, 2, 1150, 2, 3).mean((1, 3)) + 0.5)
    assert np.array_equal(root["1"][:], np.moveaxis(means, -1, 0))


# Any kind


def test_parts_can_be_chosen(cohort, tmp_path):
    assert export(cohort.folder, tmp_path, ExportConfig(file_format="png", parts=("val", "test"))) == 4
    assert set(pd.read_csv(tmp_path / "table.csv")["patient"]) == {"p3", "p4"}
    assert set(pd.read_csv(tmp_path / "instances.csv")["image"].str[7:9]) == {"p3", "p4"}


@pytest.mark.parametrize(
    ("source", "out", "settings", "message"),
    [
        (
            "set",
            "a",
            {"file_format": "png", "parts": ("test",)},
            r"nothing in split 'test'; it has train; leave out --split",
        ),
        ("cohort", "nn", {"file_format": "nnunet"}, r"--out .*/nn: nnU-Net needs .* give --out .*/Dataset001_cohort$"),
        (
            "cohort",
            "Dataset001_a",
            {"file_format": "nnunet", "parts": ("test",)},
            "nothing to train on; export the training",
        ),
        ("none", "a", {"file_format": "png"}, "none: no such cohort"),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(drawn, tmp_path, source, out, settings, message):
    with pytest.raises(InputError, match=message):
        export(drawn / source, tmp_path / out, ExportConfig(**settings))
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("config", [PNG, HF, PARQUET, QUPATH, STORES])
def test_an_interrupted_export_goes_on_and_ends_the_same(cohort, tmp_path, config):
    export(cohort.folder, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        export(cohort.folder, tmp_path / "cut", config, progress=stop_at_the_fourth)
    assert not (tmp_path / "cut" / "export.json").exists()
    (tmp_path / "cut" / ".left.png.partial-1").write_text("half")
    assert export(cohort.folder, tmp_path / "cut", config) == export(cohort.folder, tmp_path / "cut", config) == 10
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_files_of_a_finished_export_that_are_lost_are_written_again_and_changed_ones_are_left(cohort, tmp_path):
    export(cohort.folder, tmp_path / "png", PNG)
    whole = contents(tmp_path / "png")
    lost = [tmp_path / "png" / name for name in ("images/p0-0.png", "labels/p1-0.png", "table.csv")]
    lost[0].unlink()
    for file in lost[1:]:
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(CounterstainWarning, match="png: 3 files are missing or cut short; they are written again"):
        export(cohort.folder, tmp_path / "png", PNG)
    assert contents(tmp_path / "png") == whole
    Image.new("L", (9, 9)).save(lost[1])
    with pytest.raises(MismatchError, match=r"p1-0\.png: was changed since it was exported; move it away"):
        export(cohort.folder, tmp_path / "png", PNG)


def test_images_of_an_export_of_an_earlier_version_that_were_cut_short_are_written_again(cohort, tmp_path):
    export(cohort.folder, tmp_path / "png", PNG)
    whole, report = contents(tmp_path / "png"), tmp_path / "png" / "export.json"
    known = json.loads(report.read_text())
    known.pop("bytes")  # which it did not note
    report.write_text(json.dumps(known))
    assert export(cohort.folder, tmp_path / "png", PNG) == 10
    cut = tmp_path / "png" / "labels" / "p1-0.png"
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.warns(CounterstainWarning, match="png: 1 files are missing or cut short"):
        export(cohort.folder, tmp_path / "png", PNG)
    assert contents(tmp_path / "png") == whole


@contextmanager
def stop_at_the_fourth(_label, _count):
    written = itertools.count(1)

    def advance(_images):
        if next(written) == 4:
            raise KeyboardInterrupt

    yield advance


def contents(folder) -> dict[str, bytes]:
    """All files, but for the one that has a time and its own place in it."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".qpproj"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_a_folder_of_something_else_is_refused(cohort, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MismatchError, match="is not empty and was not made by counterstain"):
        export(cohort.folder, tmp_path, PNG)
    export(cohort.folder, tmp_path / "a", PNG)
    with pytest.raises(MismatchError, match=r"belongs to another run .*labels was"):
        export(cohort.folder, tmp_path / "a", ExportConfig(file_format="png", labels="tumour"))


def test_the_command_line_says_what_comes_next(run, cohort, tmp_path):
    status, printed, _ = run("export", cohort.folder, "--format", "png", "--out", tmp_path / "png", "--split", "val")
    assert status == 0
    assert printed.startswith(f"{tmp_path / 'png'}: 2 images\nread back: counterstain import dataset ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tif",), "--format tif: expected png, nnunet, hf, huggingface, qupath, ome-zarr, weights, diffusers, smp"),
        (("png", "--split", "x"), "parts.0: Input should be 'train', 'val' or 'test' (got 'x')"),
    ],
)
def test_unknown_options_are_one_line(run, cohort, tmp_path, words, message):
    status, _, error = run("export", cohort.folder, "--out", tmp_path / "out", "--format", *words)
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
