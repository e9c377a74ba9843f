"""Whole datasets in the layouts of other tools, each read by one command without a table."""

import json
import unicodedata

import numpy as np
import pytest
from drawn_cohort import draw_cohort, draw_set
from drawn_datasets import (
    AREAS,
    CLASSES,
    IDS,
    LABELME,
    NNUNET,
    SHAPE,
    aperio,
    coco,
    colours,
    instance_map,
    noise,
    of_instances,
    save,
)
from scipy.io import savemat
from typer.testing import CliRunner

from counterstain.cli import app
from counterstain.data.patches import label_mask
from counterstain.errors import ConfigError, CounterstainWarning, InputError
from counterstain.io.exports import ExportConfig, export
from counterstain.io.import_images import import_dataset, import_table

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
COLOURS = 'labels: {"#000000": background, "#ff0000": A, "#0000ff": B}\n'
NUMBERS = "labels: {0: background, 1: A, 2: B}\n"


@pytest.fixture
def here(tmp_path):
    (tmp_path / "colours.yaml").write_text(COLOURS)
    (tmp_path / "numbers.yaml").write_text(NUMBERS)
    return tmp_path


def imported(folder, name="data", **options):
    return import_dataset(folder / name, out=folder / "out", **({"mpp": 0.25, "patients": "image"} | options))


def areas(cohort, region=None):
    rows = cohort.instances if region is None else cohort.instances[cohort.instances["region"] == region]
    names = rows["subtype"].map(cohort.taxonomy.name_of)
    return {name: sorted(of) for name, of in rows.groupby(names)["area_px"]}


def contents(cohort):
    """Return what a cohort holds, whatever it was made from."""
    regions = cohort.regions.drop(columns=["pack", "index"]).sort_values("region", ignore_index=True)
    order = cohort.regions["region"].tolist()
    pixels = {name: [part.tobytes() for part in cohort.read(order.index(name))] for name in sorted(order)}
    instances = cohort.instances.sort_values(["region", "instance"], ignore_index=True)
    return regions.to_dict("records"), instances.to_dict("records"), pixels, cohort.taxonomy, cohort.mpp


# Exports of counterstain


@pytest.mark.parametrize("name", ["png", "ome-zarr"])
def test_an_exported_cohort_comes_back_equal(here, name):
    cohort = draw_cohort(here / "cohort")
    export(cohort.folder, here / "export", ExportConfig(file_format=name))
    again = import_dataset(here / "export", out=here / "out")
    for before, after in zip(contents(cohort), contents(again), strict=True):
        assert before == after


@pytest.mark.parametrize("name", ["hf", "nnunet"])
def test_other_exports_bring_labels_and_split_back(here, name):
    cohort = draw_cohort(here / "cohort")
    out = here / ("Dataset001_drawn" if name == "nnunet" else "hf")
    export(cohort.folder, out, ExportConfig(file_format=name))
    again = import_dataset(out, out=here / "out", patients=r"p\d" if name == "nnunet" else None)
    before, after = cohort.regions.set_index("region"), again.regions.set_index("region")
    assert after["patient"].to_dict() == before["patient"].to_dict()
    assert after["split"].to_dict() == before["split"].to_dict()
    assert again.mpp == cohort.mpp
    for position, region in enumerate(cohort.regions["region"]):
        there = again.regions["region"].tolist().index(region)
        masks = [label_mask(c.read(p)[1], c.subtypes(p)) for c, p in ((cohort, position), (again, there))]
        both = zip((cohort, again), masks, strict=True)
        names = [[c.taxonomy.name_of(int(label)) for label in np.unique(mask)] for c, mask in both]
        assert names[0] == names[1]
        assert np.array_equal(masks[0] > 0, masks[1] > 0)


@pytest.mark.parametrize("name", ["png", "ome-zarr"])
def test_patients_behind_generated_images_come_back(here, name):
    cohort = draw_cohort(here / "cohort")
    export(draw_set(here / "set", cohort).folder, here / "export", ExportConfig(file_format=name))
    assert import_dataset(here / "export", out=here / "out").patients("train") == ["p0", "p1", "p2"]


# nnU-Net, Hugging Face, COCO, OME-Zarr


def test_a_raw_dataset_of_nnunet(here):
    folder = here / "Dataset007_Cells"
    for case, part in (("one", "Tr"), ("two", "Ts")):
        save(folder / f"images{part}" / f"{case}_0000.png", noise(case))
        save(folder / f"labels{part}" / f"{case}.png", of_instances({"A": 1, "B": 3}, name=case))
    save(folder / "imagesTs" / "three_0000.png", noise("three"))
    (folder / "dataset.json").write_text(json.dumps(NNUNET))
    with pytest.warns(CounterstainWarning, match="left out: 1 x image of imagesTs without a label"):
        cohort = imported(here, folder.name)
    assert areas(cohort, "one") == {"A": [48, 140], "ignore": [36]}
    assert cohort.regions.set_index("region")["split"].to_dict() == {"one": "train", "two": "test"}
    (folder / "dataset.json").write_text(json.dumps(NNUNET | {"labels": {"background": 0, "all": [1, 2]}}))
    with pytest.raises(InputError, match=r"dataset.json: labels are .* expected one whole number for each name"):
        imported(here, folder.name)


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [
        ({"background": 0, "A": 1, "B": 1}, [], "labels A, B have one number"),
        (None, [{"val": ["nobody"]}], "val names nobody, of which there is no image"),
        (None, [{"val": [["one"]]}], "val: expected a list of cases"),
        (None, {"val": ["one"]}, "expected a list of folds"),
    ],
)
def test_a_dataset_of_nnunet_that_contradicts_itself_is_refused(here, labels, folds, message):
    folder = here / "Dataset007_Cells"
    save(folder / "imagesTr" / "one_0000.png", noise("one"))
    save(folder / "labelsTr" / "one.png", of_instances({"A": 1, "B": 3}, name="one"))
    (folder / "dataset.json").write_text(json.dumps(NNUNET | ({"labels": labels} if labels else {})))
    (folder / "splits_final.json").write_text(json.dumps(folds))
    with pytest.raises(InputError, match=message):
        imported(here, folder.name)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"mpp": 0.5}, {"mpp": 0.25}], r"rows of several mpp \(0.25, 0.5\); import them apart"),
        ([{"mpp": [1]}, {"mpp": [1]}], r"mpp is '\[1\]'; expected a number"),
        ([{}, {"file_name": 5}], "file_name '5' names no file of"),
        ([{}, {"file_name": "../b.png"}], "file_name '../b.png' names no file of"),
    ],
)
def test_lines_of_hugging_face_that_cannot_be_meant_are_refused(here, lines, message):
    for name in "ab":
        save(here / "data" / f"{name}.png", noise(name))
        save(here / "data" / f"{name}_mask.png", of_instances(IDS, name=name))
    known = [{"file_name": f"{name}.png", "mask_file_name": f"{name}_mask.png"} for name in "ab"]
    written = [json.dumps(row | more) for row, more in zip(known, lines, strict=True)]
    (here / "data" / "metadata.jsonl").write_text("\n".join(written))
    with pytest.raises(InputError, match=message):
        imported(here, legend=here / "numbers.yaml")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1.png,P1"], r"1.png is .*x/1.png or .*y/1.png; give them with their folders"),
        (["x/1.png,P1", "y/1.png,P2", "1.png,P3"], r"say different things of .*x/1.png"),
    ],
)
def test_a_table_of_patients_that_leaves_an_image_open_is_refused(here, rows, message):
    for name in "xy":
        save(here / "data" / name / "1.png", noise(name))
        save(here / "data" / name / "1_mask.png", of_instances(IDS, name=name))
    (here / "patients.csv").write_text("\n".join(["image,patient", *rows]))
    with pytest.raises(InputError, match=message):
        imported(here, legend=here / "numbers.yaml", patients=here / "patients.csv")


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("rgbs/a.png", "masks/a.png"),  # BCSS
        ("a.bmp", "a_anno.bmp"),  # GlaS
        ("a.png", "a_cp_masks.png"),  # Cellpose
        (f"{unicodedata.normalize('NFD', 'ä')}.png", "ä_mask.png"),
    ],
)
def test_files_go_together_as_datasets_name_them(here, image, label):
    save(here / "data" / image, noise("a"))
    save(here / "data" / label, of_instances(IDS))
    assert areas(imported(here, legend=here / "numbers.yaml")) == AREAS


def test_a_table_names_the_patients_of_pictures_side_by_side(here):
    save(here / "data" / "ä1.png", np.concatenate([noise("a")] * 5 + [colours()], axis=1))
    (here / "patients.csv").write_text(
        f"image,patient\n{unicodedata.normalize('NFD', 'ä1.png')},P1\n", encoding="utf-8"
    )
    (here / "legend.yaml").write_text('labels: {"#000000": background, "#ff0000": A, "#0000ff": B}\n')
    given = {"layout": "deepliif", "legend": here / "legend.yaml", "patients": here / "patients.csv"}
    cohort = imported(here, **given)
    assert cohort.regions["patient"].tolist() == ["P1"]


def test_a_torn_line_is_named_by_its_number(here):
    for name in ("a.png", "a_mask.png"):
        save(here / "data" / name, of_instances(IDS))
    whole = '{"file_name": "a.png", "mask_file_name": "a_mask.png"}'
    (here / "data" / "metadata.jsonl").write_text(f"{whole}\n\n{whole[:30]}")
    with pytest.raises(InputError, match=r"metadata.jsonl line 3: not JSON or cut short"):
        imported(here)


def test_an_image_folder_of_hugging_face(here):
    for name in "ab":
        save(here / "data" / "images" / f"{name}.png", noise(name))
        save(here / "data" / "masks" / f"{name}.png", of_instances(IDS, name=name))
    lines = [f"images/{name}.png,masks/{name}.png,patient {name}" for name in "ab"]
    (here / "data" / "metadata.csv").write_text("\n".join(["file_name,mask_file_name,case", *lines]))
    cohort = imported(here, legend=here / "numbers.yaml", patients="case")
    assert cohort.regions["patient"].tolist() == ["patient a", "patient b"]
    assert areas(cohort, "a") == AREAS


def test_parquet_of_hugging_face(here):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Image(), "patient": datasets.Value("string")}
    )
    for part in ("train", "test"):
        columns = {
            "image": [noise(f"{part}{i}") for i in range(3)],
            "label": [of_instances(IDS, name=str(i)) for i in range(3)],
            "patient": [f"{part} {i}" for i in range(3)],
        }
        (here / "data").mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(here / "data" / f"{part}-00000-of-00001.parquet", batch_size=2)
    cohort = imported(here, legend=here / "numbers.yaml", patients=None)
    assert sorted(cohort.regions["split"]) == ["test"] * 3 + ["train"] * 3
    assert areas(cohort, "train-00000-of-00001-00002") == AREAS
    position = cohort.regions["region"].tolist().index("train-00000-of-00001-00002")
    assert np.array_equal(cohort.read(position)[0], noise("train2"))
    with pytest.raises(InputError, match=r"change the expression or give one of its columns \(patient\)"):
        imported(here, legend=here / "numbers.yaml", patients="case")


def test_a_folder_of_coco(here):
    for name in "ab":
        save(here / "data" / "images" / f"{name}.png", noise(name))
    (here / "data" / "annotations").mkdir()
    (here / "data" / "annotations" / "instances.json").write_text(coco(["a.png", "b.png"]))
    cohort = imported(here)
    assert cohort.taxonomy.names == ("A", "B")
    assert areas(cohort, "a") == areas(cohort, "b") == AREAS


def test_a_folder_that_links_to_itself_is_read_once(here):
    put_coco(here, json.loads(coco(["a.png", "b.png"])))
    (here / "data" / "again").symlink_to(here / "data", target_is_directory=True)
    assert len(imported(here)) == 2


def put_coco(here, content, images=("a", "b")):
    for name in images:
        save(here / "data" / f"{name}.png", noise(name))
    (here / "data" / "c.json").write_text(json.dumps(content))


def test_ids_of_coco_that_pandas_wrote_as_fractions_are_those_numbers(here):
    content = json.loads(coco(["a.png", "b.png"]))
    for row in content["images"] + content["categories"]:
        row["id"] = float(row["id"])
    put_coco(here, content)
    cohort = imported(here)
    assert areas(cohort, "a") == areas(cohort, "b") == AREAS


def test_a_name_in_coco_that_spells_its_umlaut_in_another_way_keeps_its_annotations(here):
    put_coco(here, json.loads(coco(["ba\u0308r.png"])), images=["ba\u0308r"])
    cohort = imported(here)
    assert areas(cohort, cohort.regions["region"].iloc[0]) == AREAS


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"category_id": 99}, "object that cannot be read"),
        ({"segmentation": {"size": [8, 8], "counts": [64]}}, "object that cannot be read"),
        ({"segmentation": []}, "box without an outline"),
    ],
)
def test_what_a_folder_of_coco_leaves_out_is_counted(here, change, what):
    content = json.loads(coco(["a.png", "b.png"]))
    content["annotations"][-1] |= change
    put_coco(here, content)
    with pytest.warns(CounterstainWarning, match=f"left out: 1 x {what}"):
        cohort = imported(here)
    assert areas(cohort, "a") == AREAS
    assert sum(map(len, areas(cohort, "b").values())) == sum(map(len, AREAS.values())) - 1


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("images", {"id": 0}, "images: id 0 is there twice"),
        ("categories", {"id": IDS["A"]}, f"categories: id {IDS['A']} is there twice"),
        ("images", {"id": [1]}, r"images: id \[1\] is no id"),
    ],
)
def test_coco_that_contradicts_itself_is_refused(here, part, change, message):
    content = json.loads(coco(["a.png", "b.png"]))
    content[part][-1] |= change
    put_coco(here, content)
    with pytest.raises(InputError, match=message):
        imported(here)


def write_ome_zarr(place, version=2):
    import zarr
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.writer import write_image, write_labels

    fmt = FormatV04() if version == 2 else FormatV05()
    group = zarr.open_group(place, mode="w", zarr_format=version)
    sizes = {
        "axes": "cyx",
        "scale": {"c": 1.0, "y": 0.5, "x": 0.5},
        "axes_units": {"y": "micrometer", "x": "micrometer"},
    }
    write_image(np.moveaxis(noise("a"), -1, 0), group, fmt=fmt, scale_factors=[], **sizes)
    properties = [{"label-value": number, "class": name} for number, name in CLASSES.items()]
    known = {"label_metadata": {"properties": properties}, "name": "nuclei"}
    write_labels(instance_map(), group, fmt=fmt, axes="yx", scale_factors=[], scaler=None, **known)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ome_zarr's own
@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr_with_labels(here, version):
    write_ome_zarr(here / "data" / "a.ome.zarr", version)
    cohort = imported(here, labels="instances", mpp=None)
    assert areas(cohort) == AREAS
    assert cohort.mpp == 0.5
    assert np.array_equal(cohort.read(0)[0], noise("a"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ome_zarr_of_bioformats2raw_is_read_where_it_holds_one_image(here):
    import zarr

    store = here / "data" / "a.ome.zarr"
    zarr.open_group(store, mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    zarr.open_group(store / "OME", mode="w", zarr_format=2)
    write_ome_zarr(store / "0")
    cohort = imported(here, labels="instances", mpp=None)
    assert (areas(cohort), cohort.mpp) == (AREAS, 0.5)
    write_ome_zarr(store / "1")
    with pytest.raises(InputError, match=r"images 0, 1; name one in a table .*zarr\[0/labels/NAME\]"):
        imported(here, labels="instances", mpp=None)
    table = "image,label,patient\na.ome.zarr[0],a.ome.zarr[0/labels/nuclei],p1\n"
    (here / "data" / "table.csv").write_text(table)
    chosen = import_table(here / "data" / "table.csv", out=here / "chosen", mpp=0.5, labels="instances")
    assert areas(chosen) == AREAS


# Public datasets


def test_monusac_goes_in_without_code(here):
    legend = "labels: {Epithelial: Epithelial, Lymphocyte: Lymphocyte, Ambiguous: ignore}\n"
    (here / "legend.yaml").write_text(legend)
    for patient in ("TCGA-55-1594-01Z-00-DX1", "TCGA-69-7760-01Z-00-DX1"):
        for number in (1, 2):
            stem = here / "data" / patient / f"{patient}_{number}"
            save(stem.with_suffix(".tif"), noise(f"{patient}{number}"))
            stem.with_suffix(".svs").write_bytes(b"the same tile once more")
            names = ("Epithelial", "Ambiguous") if number == 2 else ("Epithelial", "Lymphocyte")
            aperio(stem.with_suffix(".xml"), names=names, name=f"{patient}{number}")
    cohort = imported(here, legend=here / "legend.yaml", patients="TCGA-..-....")
    assert set(cohort.regions["patient"]) == {"TCGA-55-1594", "TCGA-69-7760"}
    assert areas(cohort, "TCGA-55-1594-01Z-00-DX1_1") == {"Epithelial": [48, 140], "Lymphocyte": [36]}
    assert areas(cohort, "TCGA-55-1594-01Z-00-DX1_2") == {"Epithelial": [48, 140], "ignore": [36]}


def test_pannuke_goes_in_without_code(here):
    for fold in (1, 2):
        planes = np.zeros((2, *SHAPE, 6))
        for i in range(2):
            ids = instance_map(name=f"{fold}{i}")
            planes[i, ..., 5] = ids == 0
            planes[i, ..., 0] = np.where(ids == 2, 0, ids)
            planes[i, ..., 3] = np.where(ids == 2, 2, 0)
        images = np.stack([noise(f"{fold}{i}").astype(float) for i in range(2)])
        for kind, array in (("images", images), ("masks", planes)):
            (here / "data" / f"Fold {fold}" / kind / f"fold{fold}").mkdir(parents=True)
            np.save(here / "data" / f"Fold {fold}" / kind / f"fold{fold}" / f"{kind}.npy", array)
        np.save(here / "data" / f"Fold {fold}" / "images" / f"fold{fold}" / "types.npy", np.array(["Breast", "Lung"]))
    cohort = imported(here)
    assert len(cohort) == 4
    assert cohort.taxonomy.names == ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
    assert areas(cohort, "Fold 1-fold1-image-00001") == {"Neoplastic": [48, 140], "Dead": [36]}
    torn = here / "data" / "Fold 2" / "masks" / "fold2" / "masks.npy"
    torn.write_bytes(torn.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"masks\.npy: damaged"):
        imported(here)


def test_deepliif_goes_in_without_code(here):
    for part in ("train", "val"):
        pictures = [noise(f"{part}{i}") for i in range(5)]
        save(here / "data" / part / f"{part}_1.png", np.concatenate([*pictures, colours()], axis=1))
    cohort = imported(here, layout="deepliif", legend=here / "colours.yaml")
    assert sorted(cohort.regions["split"]) == ["train", "val"]
    assert areas(cohort, "train/train_1") == AREAS
    position = cohort.regions["region"].tolist().index("train/train_1")
    assert np.array_equal(cohort.read(position)[0], noise("train0"))


def test_deepliif_with_separate_pictures_goes_in_without_code(here):
    for name in ("s1", "s2"):
        save(here / "data" / f"{name}.png", noise(name))
        save(here / "data" / f"{name}_DAPI.png", noise(f"{name}d"))
        save(here / "data" / f"{name}_Seg.png", colours(name))
    with pytest.warns(CounterstainWarning, match="left out: 2 x image without a label file of its name"):
        cohort = imported(here, legend=here / "colours.yaml")
    assert areas(cohort, "s1") == AREAS


def test_points_of_ki67_become_discs(here):
    (here / "legend.yaml").write_text("labels: {1: positive, 2: negative, 3: ignore}\n")
    for name in ("p1_0001_1", "p2_0007_3"):
        x = 10 + int(name[1])
        points = [{"x": x + 15 * i, "y": 10, "label_id": i + 1} for i in range(3)]
        save(here / "data" / f"{name}.jpg", noise(name))
        (here / "data" / f"{name}.json").write_text(json.dumps(points))
    cohort = imported(here, legend=here / "legend.yaml", point_um=2.0, patients=r"(p\d+)_")
    assert areas(cohort, "p1_0001_1") == {"positive": [52], "negative": [52], "ignore": [52]}
    with pytest.raises(InputError, match="classes of its instances are not named"):
        imported(here)
    with pytest.raises(InputError, match=r"no label image has a pixel of a subtype; left out: 6 x point .*--point-um"):
        import_dataset(here / "data", out=here / "none", mpp=0.25, legend=here / "legend.yaml", patients=r"(p\d+)_")
    assert not (here / "none").exists()


def test_consep_goes_in_without_code(here):
    for part, name in (("Train", "train_1"), ("Test", "test_1")):
        save(here / "data" / part / "Images" / f"{name}.png", noise(name))
        save(here / "data" / part / "Overlay" / f"{name}.png", noise(name))
        types = {"inst_map": instance_map(float, name=name), "inst_type": np.array([[1.0], [2.0], [1.0]])}
        (here / "data" / part / "Labels").mkdir()
        savemat(here / "data" / part / "Labels" / f"{name}.mat", types)
    with pytest.warns(CounterstainWarning, match="left out: 2 x image without a label"):
        cohort = imported(here, legend=here / "numbers.yaml")
    assert areas(cohort, "train_1") == AREAS
    assert sorted(cohort.regions["split"]) == ["test", "train"]
    with pytest.warns(CounterstainWarning):
        again = import_dataset(
            here / "data", out=here / "again", mpp=1, patients="image", legend=here / "numbers.yaml", ignore_split=True
        )
    assert again.regions["split"].isna().all()


def test_labelme_files_beside_their_images(here):
    save(here / "data" / "p1" / "a.png", noise("a"))
    (here / "data" / "p1" / "a.json").write_text(LABELME)
    cohort = imported(here, patients="folder")
    assert areas(cohort) == {"A": [11, 48], "B": [18, 36]}
    assert cohort.regions["patient"].tolist() == ["p1"]


# Patients and what is refused


@pytest.fixture
def pairs(here):
    for name in ("x1", "x2"):
        save(here / "data" / "images" / f"{name}.png", noise(name))
        save(here / "data" / "labels" / f"{name}_mask.png", (instance_map(name=name) > 0) * np.uint8(255))
    return here


def test_a_table_says_whose_images_they_are_and_of_which_subtype(pairs):
    (pairs / "patients.csv").write_text("image,patient,subtype,part\nx1.png,p1,A,train\nimages/x2.png,p2,B,test\n")
    cohort = imported(pairs, patients=str(pairs / "patients.csv"))
    assert areas(cohort) == {"A": [84, 140], "B": [84, 140]}
    assert cohort.regions["split"].tolist() == ["train", "test"]
    (pairs / "patients.csv").write_text("image,patient\nx1.png,p1\n")
    with pytest.raises(InputError, match=r"patients.csv: no row for images/x2.png"):
        imported(pairs, patients=str(pairs / "patients.csv"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"patients": None},
            r"which patients its 2 images are of is not said \(first: images/x1.png\). Give --patients",
        ),
        ({"patients": "case(.)"}, r"--patients case\(.\): finds no patient in images/x1.png"),
        ({"patients": "("}, "no such file, and no regular expression"),
        ({"patients": "folder"}, "lies in no folder of a patient"),
        ({"mpp": None}, "does not say its micrometres per pixel; give --mpp"),
        ({}, r"image images/x1.png: of which subtype the tissue of its mask is, is not said|column 'subtype'"),
        ({"labels": "ids"}, "label images of ids need a taxonomy .* or --legend"),
    ],
)
def test_what_a_dataset_does_not_say_is_asked_about(pairs, options, message):
    with pytest.raises((InputError, ConfigError), match=message):
        imported(pairs, **options)
    assert not (pairs / "out").exists()


def test_two_label_files_of_one_name_are_refused(pairs):
    np.save(pairs / "data" / "labels" / "x1.npy", instance_map())
    with pytest.raises(InputError, match="is another label of the same name; move those"):
        imported(pairs)


def test_the_command_line_imports_and_refuses_in_one_line(pairs):
    (pairs / "taxonomy.yaml").write_text("labels: {255: A, 0: background}\n")
    command = [
        "import",
        "dataset",
        str(pairs / "data"),
        "--out",
        str(pairs / "out"),
        "--mpp",
        "0.5",
        "--patients",
        "x.",
    ]
    done = CliRunner().invoke(app, [*command, "--legend", str(pairs / "taxonomy.yaml")])
    assert done.exit_code == 0, done.output
    assert "next: counterstain split" in done.output
    refused = CliRunner().invoke(app, [*command, "--format", "dicom"])
    assert refused.exit_code != 0
