"""Label files of other programs in a table: instance maps, arrays, colours, outlines."""

import json

import numpy as np
import pytest
import scipy.io
import shapely
import tifffile
from drawn_datasets import (
    AREAS,
    BOXES,
    CLASSES,
    IDS,
    LABELME,
    SHAPE,
    aperio,
    coco,
    colours,
    instance_map,
    noise,
    of_instances,
    ring,
    save,
)
from pycocotools import mask as coco_mask

from counterstain.errors import ConfigError, CounterstainWarning, InputError
from counterstain.io.import_images import import_table
from counterstain.taxonomy import IGNORE, Taxonomy

NUMBERS = "labels: {0: background, 1: A, 2: B}\n"
COLOURS = 'labels: {"#000000": background, "#ff0000": A, "#0000ff": B}\n'


def imported(folder, label, *, subtype=None, legend=None, out="out", **options):
    save(folder / "a.png", noise("a"))
    header, row = "image,label,patient", f"a.png,{label},p1"
    if subtype:
        header, row = f"{header},subtype", f"{row},{subtype}"
    (folder / "table.csv").write_text(f"{header}\n{row}\n")
    if legend:
        (folder / "legend.yaml").write_text(legend)
        options["legend"] = folder / "legend.yaml"
    return import_table(folder / "table.csv", mpp=options.pop("mpp", 0.5), out=folder / out, **options)


def areas(cohort):
    """Return subtype -> areas of its instances, as they are drawn in AREAS."""
    names = cohort.instances["subtype"].map(cohort.taxonomy.name_of)
    return {name: sorted(of) for name, of in cohort.instances.groupby(names)["area_px"]}


def report_of(cohort):
    return json.loads((cohort.folder / "import.json").read_text())


SAVED = {
    "u16.tif": lambda path: tifffile.imwrite(path, instance_map(np.uint16)),
    "u32.tif": lambda path: tifffile.imwrite(path, instance_map(np.uint32) * 70_000),
    "i32.tif": lambda path: tifffile.imwrite(path, instance_map(np.int32), compression="zlib"),
    "u16.png": lambda path: save(path, instance_map(np.uint16)),
    "u8.png": lambda path: save(path, instance_map(np.uint8)),
    "i64.npy": lambda path: np.save(path, instance_map(np.int64)),
    "f64.npy": lambda path: np.save(path, instance_map(np.float64)),
    "one.npz": lambda path: np.savez_compressed(path, instances=instance_map()),
}


@pytest.mark.parametrize("name", SAVED)
def test_instance_maps_of_any_depth_keep_touching_instances_apart(tmp_path, name):
    SAVED[name](tmp_path / name)
    cohort = imported(tmp_path, name, subtype="A", labels="instances")
    assert areas(cohort) == {"A": [36, 48, 140]}
    assert np.array_equal(cohort.read(0)[1] > 0, instance_map() > 0)


def test_a_part_of_an_array_is_named_with_brackets(tmp_path):
    np.save(tmp_path / "stack.npy", np.stack([instance_map() * 0, instance_map()]))
    np.savez(tmp_path / "more.npz", other=np.zeros(3), maps=instance_map())
    assert areas(imported(tmp_path, "stack.npy[1]", subtype="A", labels="instances")) == {"A": [36, 48, 140]}
    again = imported(tmp_path, "more.npz[maps]", subtype="A", labels="instances", out="again")
    assert areas(again) == {"A": [36, 48, 140]}
    with pytest.raises(InputError, match=r"more.npz: holds the arrays maps, other; name one"):
        imported(tmp_path, "more.npz", subtype="A", labels="instances", out="other")


def test_arrays_hold_ids_and_masks_as_images_do(tmp_path):
    np.save(tmp_path / "ids.npy", of_instances(IDS, np.int16))
    assert areas(imported(tmp_path, "ids.npy", legend=NUMBERS)) == AREAS
    np.save(tmp_path / "mask.npy", instance_map() > 0)
    assert areas(imported(tmp_path, "mask.npy", subtype="A", out="mask")) == {"A": [84, 140]}


def test_images_may_be_arrays(tmp_path):
    np.save(tmp_path / "image.npy", noise("b").astype(np.float64))
    np.save(tmp_path / "map.npy", instance_map())
    (tmp_path / "t.csv").write_text("image,label,patient,subtype\nimage.npy,map.npy,p1,A\n")
    cohort = import_table(tmp_path / "t.csv", mpp=1, out=tmp_path / "out", labels="instances")
    assert np.array_equal(cohort.read(0)[0], noise("b"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (instance_map(float) / 2, r"an array of \(40, 48\), float64 with fractions is no label image; expected whole"),
        (np.zeros((*SHAPE, 5)), r"an array of \(40, 48, 5\), float64 is no label image.*--labels planes"),
        (-instance_map(), "is no label image"),
        (instance_map(np.uint64) + np.uint64(2**63), "is no label image"),
        (np.float64(3), r"a.npy: an array of \(\); expected \(rows, columns\)"),
        (np.zeros((0, 48)), r"an array of \(0, 48\); expected"),
        (np.array([{"inst_map": 1}], object), r"holds Python objects \(a pickle\), which run code .* numpy.savez"),
    ],
    ids=["fractions", "channels", "negative", "beyond 63 bits", "without dimensions", "empty", "pickle"],
)
def test_arrays_that_are_not_certain_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message):
        imported(tmp_path, "a.npy", subtype="A", labels="instances")
    assert not (tmp_path / "out").exists()


def test_a_table_gives_the_instances_of_a_map_their_subtypes(tmp_path):
    save(tmp_path / "map.png", instance_map(np.uint16))
    lines = [f"a.png,{number},{name}" for number, name in CLASSES.items()]
    table = tmp_path / "instances.csv"
    table.write_text("\n".join(["image,instance,subtype", *lines]))
    cohort = imported(tmp_path, "map.png", labels="instances", instance_table=table)
    assert areas(cohort) == AREAS
    table.write_text("\n".join(["image,instance,subtype", *lines[:2]]))
    with pytest.raises(InputError, match=r"map.png: instance 3 is not in the table of instances \(1 of 3"):
        imported(tmp_path, "map.png", labels="instances", instance_table=table, out="other")


def test_rows_of_a_table_of_instances_that_fit_nothing_are_counted(tmp_path):
    save(tmp_path / "map.png", instance_map(np.uint16))
    table = tmp_path / "instances.csv"
    lines = [f"a.png,{number},{name}" for number, name in {**CLASSES, 8: "B", 9: "B"}.items()]
    table.write_text("\n".join(["image,instance,subtype", *lines, "c.png,1,A"]))
    with pytest.warns(CounterstainWarning, match=r"rows for other images: c.png; left out"):
        cohort = imported(tmp_path, "map.png", labels="instances", instance_table=table)
    assert report_of(cohort)["left_out"] == {"rows of the table of instances without an instance in its image": 2}
    assert areas(cohort) == AREAS


def test_an_instance_map_beside_labels_keeps_touching_instances_apart(tmp_path):
    labels = (instance_map() > 0).astype(np.uint8)
    labels[35:38, 2:6] = 255
    save(tmp_path / "map.png", instance_map(np.uint16))
    save(tmp_path / "labels.png", labels)
    save(tmp_path / "a.png", noise("a"))
    (tmp_path / "t.csv").write_text("image,label,patient,map\na.png,labels.png,p1,map.png\n")
    options = {"labels": "ids", "taxonomy": Taxonomy.named("her2"), "columns": {"instances": "map"}}
    cohort = import_table(tmp_path / "t.csv", mpp=1, out=tmp_path / "out", **options)
    assert cohort.instances[["subtype", "area_px"]].to_numpy().tolist() == [[1, 48], [1, 36], [1, 140], [IGNORE, 12]]


TYPES = {
    "of CoNSeP": {
        "inst_map": instance_map(float),
        "type_map": of_instances(IDS, float),
        "inst_type": np.array([[1.0], [2.0], [1.0]]),
        "inst_centroid": np.zeros((3, 2)),
    },
    "of HoVer-Net": {"inst_map": instance_map(), "inst_uid": [[3], [1], [2]], "inst_type": [[1], [1], [2]]},
    "of Lizard": {"inst_map": instance_map(), "id": [[1, 2, 3]], "class": [[1], [2], [1]]},
    "a map of types": {"inst_map": instance_map(), "type_map": of_instances(IDS)},
    "with a hidden instance": {"inst_map": np.where(instance_map() == 2, 0, instance_map()), "inst_type": [1, 2, 1]},
}


@pytest.mark.parametrize("kind", TYPES)
def test_files_of_hovernet_bring_the_types_of_their_instances(tmp_path, kind):
    scipy.io.savemat(tmp_path / "a.mat", TYPES[kind])
    expected = AREAS if "hidden" not in kind else {"A": [48, 140]}
    assert areas(imported(tmp_path, "a.mat", legend=NUMBERS)) == expected
    np.savez(tmp_path / "a.npz", **TYPES[kind])
    assert areas(imported(tmp_path, "a.npz", legend=NUMBERS, labels="instances", out="npz")) == expected


def test_arrays_that_claim_more_than_they_hold_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", instance_map())
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole.replace(b"(40, 48), }      ", b"(4000000, 48000)}"))
    with pytest.raises(InputError, match=r"a.npy"):
        imported(tmp_path, "a.npy", subtype="A", labels="instances")
    np.save(tmp_path / "planes.npy", np.stack([instance_map(np.uint64) + np.uint64(2**63)] * 2, axis=-1))
    with pytest.raises(InputError, match=r"planes.npy: an array of .* uint64; expected \(rows, columns, classes\)"):
        imported(tmp_path, "planes.npy", legend=NUMBERS, labels="planes")


def test_types_that_contradict_each_other_are_ignored_or_refused(tmp_path):
    many = np.arange(1, 21).repeat(96).reshape(SHAPE)  # bands of two rows
    types = np.ones(20, int)
    swapped = np.where(many == 7, 2, 1)
    scipy.io.savemat(tmp_path / "a.mat", {"inst_map": many, "inst_type": types, "type_map": swapped})
    cohort = imported(tmp_path, "a.mat", legend=NUMBERS)
    assert areas(cohort) == {"A": [96] * 19, "ignore": [96]}
    assert list(report_of(cohort)["left_out"].values()) == [1]
    scipy.io.savemat(tmp_path / "a.mat", {**TYPES["of CoNSeP"], "inst_type": [2, 1, 2]})
    with pytest.raises(InputError, match=r"a.mat: type_map gives instance 1 the type 1, the list 2 \(as with 3 of 3\)"):
        imported(tmp_path, "a.mat", legend=NUMBERS, out="other")
    scipy.io.savemat(tmp_path / "a.mat", {"inst_map": instance_map(), "inst_uid": [1, 1, 2, 3], "inst_type": [1] * 4})
    with pytest.raises(InputError, match=r"a.mat: 3 instances but 4 types"):
        imported(tmp_path, "a.mat", legend=NUMBERS, out="other")


def test_types_that_are_only_numbers_or_not_certain_are_asked_about(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", TYPES["of CoNSeP"])
    with pytest.raises(InputError, match=r"classes of its instances are numbers: 1, 2; say .* --legend"):
        imported(tmp_path, "a.mat")
    with pytest.raises(InputError, match=r"legend.yaml: no meaning for label '2'; found in the annotations: '1' \(2\)"):
        imported(tmp_path, "a.mat", legend="labels: {1: A}\n")
    scipy.io.savemat(tmp_path / "a.mat", {"inst_map": instance_map(), "inst_type": [1, 2]})
    with pytest.raises(InputError, match=r"a.mat: 3 instances but 2 types"):
        imported(tmp_path, "a.mat", legend=NUMBERS)
    half = of_instances(IDS)
    half[2:5, 2:10] = 2
    scipy.io.savemat(tmp_path / "a.mat", {"inst_map": instance_map(), "type_map": half})
    with pytest.raises(InputError, match=r"instance 1 has as many pixels of type"):
        imported(tmp_path, "a.mat", legend=NUMBERS)
    scipy.io.savemat(tmp_path / "a.mat", {"inst_map": instance_map()[:9], "inst_type": [1, 2]})
    with pytest.raises(InputError, match=r"a.mat: is 9 x 48 px but its image is 40 x 48 px"):
        imported(tmp_path, "a.mat", legend=NUMBERS)


def test_a_legend_says_what_colours_mean(tmp_path):
    save(tmp_path / "seg.png", colours())
    cohort = imported(tmp_path, "seg.png", legend=COLOURS)
    assert areas(cohort) == AREAS
    assert cohort.taxonomy.names == ("A", "B")


@pytest.mark.parametrize("kind", [np.uint16, np.int64])
def test_numbers_under_a_legend_of_colours_are_refused(tmp_path, kind):
    np.save(tmp_path / "ids.npy", (colours()[..., 0] > 0).astype(kind))
    with pytest.raises(InputError, match=r"holds numbers, .* where .*legend.yaml names colours"):
        imported(tmp_path, "ids.npy", legend=COLOURS)


def test_an_unknown_colour_is_named_with_its_place_and_count(tmp_path):
    drawn = colours()
    drawn[30, 40:44] = 0, 255, 0
    save(tmp_path / "seg.png", drawn)
    with pytest.raises(
        InputError,
        match=r"seg.png: .*legend.yaml does not say what #00ff00 means, .*\(4 pixels, .* row 30, column 40\)",
    ):
        imported(tmp_path, "seg.png", legend=COLOURS)
    save(tmp_path / "seg.jpg", colours())
    with pytest.raises(InputError, match=r"seg.jpg: was compressed with losses"):
        imported(tmp_path, "seg.jpg", legend=COLOURS)
    from PIL import Image

    save(tmp_path / "seg.png", np.asarray(Image.open(tmp_path / "seg.jpg")))
    with pytest.raises(InputError, match=r"So it is with \d+ more values: was it resized or saved as JPEG before"):
        imported(tmp_path, "seg.png", legend=COLOURS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("legend", "message"),
    [
        ('labels: {"#ff0000": A, red: B}\n', "legend.yaml: 'red' is no value; expected 255, 1-254 or #ff0000"),
        ('labels: {"#ff0000": A, 3: B}\n', "legend.yaml: numbers and colours together"),
        ("A: 1\n", r'legend.yaml: expected labels: and under it a line for each, such as "#ff0000": positive'),
        ('labels: {"#000000": background}\n', "legend.yaml: .*at least 1|legend.yaml"),
    ],
)
def test_a_legend_that_cannot_be_meant_is_refused(tmp_path, legend, message):
    save(tmp_path / "seg.png", colours())
    with pytest.raises((InputError, ConfigError), match=message):
        imported(tmp_path, "seg.png", legend=legend)


def runs(number):
    inside = np.asfortranarray(instance_map() == number, dtype=np.uint8)
    return {"size": list(SHAPE), "counts": coco_mask.encode(inside)["counts"].decode()}


def plain_runs(number):
    inside = (instance_map() == number).T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    return {"size": list(SHAPE), "counts": np.diff([0, *edges, inside.size]).tolist()}


@pytest.mark.parametrize("segmentation", [None, runs, plain_runs], ids=["outlines", "compressed", "runs"])
def test_coco_outlines_and_masks_are_instances(tmp_path, segmentation):
    (tmp_path / "coco.json").write_text(coco(["a.png", "b.png"], segmentation=segmentation))
    assert areas(imported(tmp_path, "coco.json[a.png]")) == AREAS
    with pytest.raises(InputError, match=r"annotations of several images; name one, as in coco.json\[IMAGE\]"):
        imported(tmp_path, "coco.json", out="other")


def test_crowds_of_coco_are_ignored(tmp_path):
    (tmp_path / "coco.json").write_text(coco(["a.png"], segmentation=plain_runs, iscrowd=1))
    content = json.loads((tmp_path / "coco.json").read_text())
    content["annotations"][0]["iscrowd"] = 0
    (tmp_path / "coco.json").write_text(json.dumps(content))
    assert areas(imported(tmp_path, "coco.json")) == {"A": [48], "ignore": [36, 140]}


def test_labelme_shapes_are_instances_and_a_group_is_one(tmp_path):
    (tmp_path / "a.json").write_text(LABELME)
    cohort = imported(tmp_path, "a.json")
    assert report_of(cohort)["left_out"] == {"point (discs are drawn with --point-um)": 1}
    assert areas(cohort) == {"A": [11, 48], "B": [18, 36]}
    with_point = imported(tmp_path, "a.json", point_um=3.0, out="points")
    assert len(areas(with_point)["A"]) == 3


def test_labelme_files_that_contradict_their_image_are_refused(tmp_path):
    said = json.loads(LABELME)

    def write(**changes):
        (tmp_path / "a.json").write_text(json.dumps(said | changes))

    write(imageHeight=48, imageWidth=40)
    with pytest.raises(InputError, match=r"a.json: is 48 x 40 px but its image is 40 x 48 px"):
        imported(tmp_path, "a.json")
    write(imagePath="..\\raw\\scan7.jpg")
    with pytest.warns(CounterstainWarning, match=r"imagePath of a.json is another image; taken as renamed"):
        imported(tmp_path, "a.json", out="renamed")
    save(tmp_path / "b.png", noise("b"))
    write(imagePath="b.png")
    with pytest.raises(InputError, match=r"a.json: its imagePath is b.png, not a.png, and both are there"):
        imported(tmp_path, "a.json", out="other")
    said["shapes"][2]["points"] = [[20.0, 20.0], [30.0, 30.0]]
    write()
    assert report_of(imported(tmp_path, "a.json", out="odd"))["left_out"]["object that cannot be read"] == 1


def test_brackets_in_the_names_of_folders_and_images_are_no_parts(tmp_path):
    place = tmp_path / "P[1] (copy)"
    aperio(place / "a.xml", names=("A", "B"))
    assert areas(imported(place, "a.xml")) == AREAS
    (place / "coco.json").write_text(coco(["a[2].png"]))
    assert areas(imported(place, "coco.json[a[2].png]", out="coco")) == AREAS
    np.save(place / "maps.npy", instance_map()[None])
    assert areas(imported(place, "maps.npy[0]", subtype="A", labels="instances", out="map")) == {"A": [36, 48, 140]}


def test_geojson_of_an_image_is_read_with_its_holes(tmp_path):
    def feature(number, holes=()):
        geometry = json.loads(shapely.to_geojson(shapely.Polygon(ring(BOXES[number]), holes)))
        classified = {"objectType": "annotation", "classification": {"name": CLASSES[number]}}
        return {"type": "Feature", "geometry": geometry, "properties": classified}

    features = [feature(1), feature(2), feature(3, [ring((22, 22, 24, 24))])]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert areas(imported(tmp_path, "a.geojson")) == {"A": [48, 136], "B": [36]}


def test_outlines_of_another_scale_are_refused_and_one_stray_is_counted(tmp_path):
    aperio(tmp_path / "a.xml", names=("A", "B"))
    save(tmp_path / "small.png", noise("small", (10, 10)))
    (tmp_path / "t.csv").write_text("image,label,patient\nsmall.png,a.xml,p1\n")
    with pytest.raises(InputError, match=r"a.xml: most outlines lie beside the image: they reach to x 34, y 30"):
        import_table(tmp_path / "t.csv", mpp=1, out=tmp_path / "out")
    save(tmp_path / "small.png", noise("small", (15, 40)))
    cohort = import_table(tmp_path / "t.csv", mpp=1, out=tmp_path / "out")
    assert report_of(cohort)["left_out"] == {"outlines beside the image": 1}


def test_classes_become_background_and_what_is_ignored(tmp_path):
    aperio(tmp_path / "a.xml", names=("Epithelial", "Ambiguous"))
    cohort = imported(tmp_path, "a.xml", legend="labels: {Epithelial: tumour cell, Ambiguous: ignore}\n")
    assert areas(cohort) == {"tumour cell": [48, 140], "ignore": [36]}
    cohort = imported(tmp_path, "a.xml", legend="labels: {Epithelial: A, Ambiguous: background}\n", out="other")
    assert areas(cohort) == {"A": [48, 140]}


def test_shrinking_keeps_touching_instances_apart(tmp_path):
    np.save(tmp_path / "map.npy", instance_map())
    cohort = imported(tmp_path, "map.npy", subtype="A", labels="instances", shrink=2, min_area_px=10)
    assert areas(cohort) == {"A": [12, 35]}
    report = report_of(cohort)
    assert (report["dropped_components"], report["dropped_px"]) == (1, 9)


def test_an_import_of_instances_is_continued(tmp_path):
    np.save(tmp_path / "map.npy", instance_map())
    first = imported(tmp_path, "map.npy", subtype="A", labels="instances")
    assert imported(tmp_path, "map.npy", subtype="A", labels="instances").fingerprint == first.fingerprint


def test_side_by_side_pictures_are_parts_of_one_file(tmp_path):
    save(tmp_path / "row.png", np.concatenate([noise("x"), noise("y"), colours()], axis=1))
    (tmp_path / "legend.yaml").write_text(COLOURS)
    (tmp_path / "t.csv").write_text("image,label,patient\nrow.png[1/3],row.png[3/3],p1\n")
    cohort = import_table(tmp_path / "t.csv", mpp=1, out=tmp_path / "out", legend=tmp_path / "legend.yaml")
    assert np.array_equal(cohort.read(0)[0], noise("x"))
    assert areas(cohort) == AREAS
