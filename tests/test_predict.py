import json
import math
import os
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import shapely
import tifffile
import torch
from mirax import write_mirax
from PIL import Image
from shapely import Point

from counterstain import predict
from counterstain.checkpoints import CheckpointHeader, read_header, save_checkpoint
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.region_store import Region
from counterstain.errors import CounterstainError, CounterstainWarning, InputError, MismatchError
from counterstain.io.annotations import read_annotations
from counterstain.io.outlines import Span, join, pieces, read_areas, spans
from counterstain.io.regions import place, rasterise
from counterstain.io.slides import Box, Slide
from counterstain.segmentation import predict as predict_module
from counterstain.segmentation import predict_images as predict_images_module
from counterstain.segmentation.inference import everywhere, sliding_window_inference, tile_rows
from counterstain.segmentation.model import Segmenter
from counterstain.segmentation.predict import (
    PredictConfig,
    Tissue,
    pieces_by_row,
    predict_slide,
    predicted_boxes,
)
from counterstain.segmentation.predict_images import predict_cohort
from counterstain.segmentation.segmenter_config import SegmenterConfig, Windows
from counterstain.taxonomy import Taxonomy

HER2 = Taxonomy.named("her2")
SIZE_PX, OVERLAP_PX = 32, 8
WINDOWS = Windows(SIZE_PX, OVERLAP_PX, 4)
TRAINED_PX = 64


class Darkness:
    """A segmenter that looks at each pixel alone: the darker, the likelier."""

    config = SegmenterConfig()

    def tumour_logits(self, images: torch.Tensor) -> torch.Tensor:
        return (128 - images[..., 1].float()) / 16

    def to(self, _device):
        return self


class Context(Darkness):
    """A segmenter whose answer depends on where in its window a pixel lies, and on all of the window."""

    def tumour_logits(self, images: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(-1, 1, images.shape[1])
        mean = images.float().mean((1, 2, 3))[:, None, None] / 255
        return super().tumour_logits(images) + ramp[:, None] + ramp * mean


class Window:
    """An image that is read piece by piece; white beyond its edge."""

    def __init__(self, image: np.ndarray) -> None:
        self._image, self.shape = image, image.shape

    def read(self, y, x, height, width):
        margin = 200
        padded = np.pad(self._image, [(margin, margin), (margin, margin), (0, 0)], constant_values=255)
        return padded[margin + y : margin + y + height, margin + x : margin + x + width]


def disc(image: np.ndarray, y: float, x: float, radius: float, shade: int = 40) -> np.ndarray:
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    image[(rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 < radius**2] = (shade + 30, shade, shade)
    return image


def ground(height: int, width: int) -> np.ndarray:
    """Pale tissue, dark nowhere."""
    noise = np.random.default_rng(0).integers(-8, 8, (height, width, 3))
    return (np.array([230, 180, 190]) + noise).astype(np.uint8)


def grid(shape, tile_windows: int = 4) -> tuple[list[Span], list[Span]]:
    rows, columns = (spans(length, SIZE_PX, OVERLAP_PX, tile_windows) for length in shape[:2])
    return rows, columns


def tiled(image: np.ndarray, segmenter=None, tile_windows: int = 4) -> list:
    rows = tile_rows(Window(image), WINDOWS, tile_windows=tile_windows)
    made = pieces_by_row(segmenter or Darkness(), rows, windows=WINDOWS, threshold=0.5)
    return [piece for of_row in made for piece in of_row]


def painted(polygons, shape) -> np.ndarray:
    return rasterise(list(enumerate(polygons, start=1)), shape[:2]) > 0


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


# Tiles


@pytest.mark.parametrize("length", [1, 20, 32, 33, 100, 101, 150, 151, 1000])
@pytest.mark.parametrize("overlap", [0, 8, 16, 24, 31])
def test_tiles_answer_for_every_pixel_once_and_hold_all_windows_of_theirs(length, overlap):
    stride, found = SIZE_PX - overlap, spans(length, SIZE_PX, overlap, 4)
    assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])]
    assert found[-1].stop == length
    assert [s.last for s in found] == [*(False for _ in found[1:]), True]
    for span in found:
        assert (span.read_from + overlap) % stride == 0
        assert (span.read_px - SIZE_PX) % stride == 0
        assert span.read_from <= span.start
        assert span.read_from + span.read_px >= span.stop + (not span.last)
        before, after = span.read_from - stride, span.read_from + span.read_px - SIZE_PX + stride
        assert before < -overlap or before + SIZE_PX <= span.start  # the window before shows none of its pixels
        assert span.last or after > span.stop  # nor does the one after, not even the pixel on the seam


def test_probabilities_do_not_depend_on_the_tiles():
    image = np.random.default_rng(0).integers(0, 256, (200, 170, 3), dtype=np.uint8)

    def whole(tile_windows):
        found = np.zeros(image.shape[:2])
        rows, columns = grid(image.shape, tile_windows)
        for row in rows:
            for column in columns:
                view = Window(image).read(row.read_from, column.read_from, row.read_px, column.read_px)
                (probability,) = sliding_window_inference(Context(), [view], WINDOWS)
                y, x = ((span.start - span.read_from, span.stop - span.start) for span in (row, column))
                own = probability[y[0] : y[0] + y[1], x[0] : x[0] + x[1]]
                found[row.start : row.stop, column.start : column.stop] = own
        return found

    assert len(grid(image.shape, 4)[0]) > 2
    np.testing.assert_allclose(whole(4), whole(1000), atol=1e-5)


class Seen(Context):
    """Counts the windows that it is shown, apart from the blank ones that fill the last batch."""

    def __init__(self) -> None:
        self.windows = self.batches = 0

    def tumour_logits(self, images: torch.Tensor) -> torch.Tensor:
        self.windows += int(images.flatten(1).any(1).sum())
        self.batches += 1
        return super().tumour_logits(images)


def outlined(segmenter, view, has_tissue=everywhere) -> list:
    made = pieces_by_row(segmenter, tile_rows(view, WINDOWS, has_tissue, 4), windows=WINDOWS, threshold=0.5)
    return [piece for of_row in made for piece in of_row]


def test_the_network_sees_every_window_once_in_full_batches():
    image, segmenter = ground(300, 320), Seen()
    outlined(segmenter, Window(image))
    stride = SIZE_PX - OVERLAP_PX
    assert segmenter.windows == math.ceil(300 / stride) * math.ceil(320 / stride)
    assert segmenter.batches == math.ceil(segmenter.windows / WINDOWS.batch_size)


@pytest.mark.parametrize("overlap", [0, 8, 20])
def test_windows_of_glass_are_not_seen_and_outlines_on_tissue_stay_as_they_are(overlap, monkeypatch):
    monkeypatch.setitem(globals(), "WINDOWS", Windows(SIZE_PX, overlap, 4))
    image, tissue = np.full((300, 320, 3), 250, np.uint8), np.zeros((300, 320), bool)
    tissue[40:170, 60:200] = True
    image[tissue] = ground(130, 140).reshape(-1, 3)
    image = disc(disc(image, 100, 100, 45), 150, 190, 30)

    def has_tissue(y, x, height, width):
        return tissue[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)].any()

    everything, masked = Seen(), Seen()
    whole, found = (
        join(outlined(*by), simplify_px=0) for by in ((everything, Window(image)), (masked, Window(image), has_tissue))
    )
    assert masked.windows < everything.windows / 2
    inside = shapely.box(60.5, 40.5, 199.5, 169.5)  # outlines interpolate between the centres of pixels
    one, other = (shapely.union_all([area.polygon for area in areas]).intersection(inside) for areas in (whole, found))
    assert one.area > 5000
    assert one.symmetric_difference(other).area < 0.01


# Outlines


def test_a_large_disc_across_tiles_is_one_outline_without_seams():
    image = disc(ground(300, 320), 150, 160, 120)
    (area,) = join(tiled(image))
    assert len(grid(image.shape)[0]) > 3
    assert not area.polygon.interiors
    assert area.polygon.area == pytest.approx(np.pi * 120**2, rel=0.005)
    circle = Point(160, 150).buffer(120, 64)
    assert area.polygon.hausdorff_distance(circle) < 1.6
    assert iou(painted([area.polygon], image.shape), image[..., 1] < 128) > 0.98


def test_tiles_and_the_whole_image_give_the_same_outlines():
    image = ground(300, 320)
    for y, x, radius in ((60, 70, 40), (150, 200, 70), (260, 60, 25), (20, 300, 12)):
        disc(image, y, x, radius)
    in_tiles, in_one = (join(tiled(image, Context(), windows), simplify_px=0) for windows in (4, 1000))
    assert len(in_tiles) == len(in_one)
    for one, other in zip(in_tiles, in_one, strict=True):
        assert one.polygon.symmetric_difference(other.polygon).area < 0.01
        assert one.mean_probability == pytest.approx(other.mean_probability, abs=1e-4)


def test_before_they_are_simplified_exactly_the_pixels_above_the_threshold_lie_inside():
    image = np.random.default_rng(1).integers(60, 196, (90, 100, 3), dtype=np.uint8)
    image[image == 128] = 129  # a probability of just 0.5 lies on the outline itself
    areas = join(tiled(image), simplify_px=0)
    assert np.array_equal(painted([area.polygon for area in areas], image.shape), image[..., 1] < 128)


def test_holes_are_kept_across_seams_and_the_mean_probability_is_that_of_the_pixels_inside():
    image = disc(disc(ground(300, 300), 150, 150, 120, shade=100), 150, 150, 70, shade=190)
    (area,) = join(tiled(image))
    (hole,) = area.polygon.interiors
    assert shapely.Polygon(hole).area == pytest.approx(np.pi * 70**2, rel=0.01)
    assert area.mean_probability == pytest.approx(1 / (1 + np.exp(-28 / 16)), abs=1e-4)


def test_tumour_at_the_edge_of_the_image_reaches_the_edge_and_without_tumour_there_is_no_outline():
    (area,) = join(tiled(np.full((100, 90, 3), 40, np.uint8)))
    assert area.polygon.bounds == (0, 0, 90, 100)
    assert area.polygon.area == 9000
    assert join(tiled(ground(100, 100))) == []


def test_parts_that_touch_at_a_corner_are_valid():
    checks = np.kron(np.indices((6, 6)).sum(0) % 2, np.ones((5, 5))).astype(np.float32)
    span = Span(0, 30, 0, 30)
    found = list(pieces(checks, span, span, 0.5))
    assert all(piece.polygon.is_valid for piece in found)
    assert sum(piece.pixels for piece in found) == checks.sum()


# Slides


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint whose network is replaced by a look at each pixel."""
    folder = tmp_path / "segmenter"
    config = SegmenterConfig(encoder="tu-test_resnet", encoder_weights=None, decoder_channels=(16, 16, 8, 8, 8))
    header = CheckpointHeader(
        kind="segmenter", taxonomy=HER2, size_px=TRAINED_PX, mpp=1.0, config=config.model_dump(mode="json"), seed=0,
        patients_seen=(), cohort="",
    )  # fmt: skip
    header = save_checkpoint(folder, Segmenter(config).state_dict(), header)
    for module in (predict_module, predict_images_module):
        monkeypatch.setattr(module, "load_segmenter", lambda _folder: (Darkness(), header))
    return folder


def slide_image() -> np.ndarray:
    """Tissue at 0.5 mpp on white glass, with a ring and a disc of tumour."""
    image = np.full((900, 1200, 3), 255, np.uint8)
    image[100:800, 100:900] = ground(700, 800)
    disc(disc(image, 400, 450, 260), 400, 450, 100, shade=170)
    return disc(image, 700, 800, 30)


@pytest.fixture
def slide(tmp_path):
    path = tmp_path / "slide.tif"
    resolution = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}  # 0.5 mpp
    tifffile.imwrite(path, slide_image(), photometric="rgb", tile=(256, 256), **resolution)
    return path


def read_back(path):
    return read_annotations(path, "qupath").annotations


class Shades(Darkness):
    """A segmenter of two subtypes: grey and black pixels."""

    def tumour_logits(self, images: torch.Tensor) -> torch.Tensor:
        grey = images[..., 1].float()
        return torch.stack([(128 - grey) / 16, (160 - 2 * grey) / 16], dim=1)


def test_a_segmenter_of_subtypes_outlines_each_under_its_own_class(checkpoint, tmp_path, monkeypatch):
    about = read_header(checkpoint).config | {"classes": "subtypes"}
    header = read_header(checkpoint).model_copy(update={"config": about})
    monkeypatch.setattr(predict_module, "load_segmenter", lambda _folder: (Shades(), header))
    image = disc(disc(np.full((700, 700, 3), 255, np.uint8), 200, 200, 100, shade=60), 500, 500, 60, shade=0)
    tifffile.imwrite(tmp_path / "s.tif", image, photometric="rgb", tile=(256, 256))
    predict_slide(checkpoint, tmp_path / "s.tif", tmp_path / "s.geojson", mpp_level0=1.0)
    found = {area.label: area for area in read_areas(tmp_path / "s.geojson")}
    assert sorted(found) == ["HER2 0", "HER2 1+"]
    assert found["HER2 0"].area_um2 == pytest.approx(np.pi * 100**2, rel=0.02)
    assert found["HER2 1+"].polygon.centroid.x == pytest.approx(500, abs=1)


def test_what_is_predicted_and_read_back_covers_the_tumour_of_the_slide(checkpoint, slide, tmp_path):
    prediction = predict_slide(checkpoint, slide, tmp_path / "x.geojson", PredictConfig())
    annotations = read_back(tmp_path / "x.geojson")
    assert prediction.areas == len(annotations) == 2
    placed = place([a.polygon for a in annotations], Box(0, 0, 1200, 900), 2.0)
    seen = slide_image()[..., 1].reshape(450, 2, 600, 2).mean((1, 3)) < 128
    assert iou(painted(placed.polygons, (450, 600)), seen) > 0.98
    ring = max((a.polygon for a in annotations), key=lambda polygon: polygon.area)
    assert len(ring.interiors) == 1
    assert {a.label for a in annotations} == {"tumour"}


def test_the_file_is_as_qupath_reads_it_without_small_areas_if_wanted(checkpoint, slide, tmp_path):
    config = PredictConfig(object_type="detection")
    predict_slide(checkpoint, slide, tmp_path / "x.geojson", config)
    content = json.loads((tmp_path / "x.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    feature = max(content["features"], key=lambda f: f["properties"]["measurements"][1]["value"])
    assert feature["properties"]["objectType"] == "detection"
    assert feature["properties"]["classification"] == {"name": "tumour", "color": [200, 0, 0]}
    measured = {m["name"]: m["value"] for m in feature["properties"]["measurements"]}
    assert measured["Area um^2"] == pytest.approx(np.pi * (260**2 - 100**2) / 4, rel=0.01)
    assert 0.9 < measured["Mean probability"] <= 1
    assert len({f["id"] for f in content["features"]}) == 2
    assert predict_slide(checkpoint, slide, tmp_path / "y.geojson", PredictConfig(min_area_um2=1000)).areas == 1


def test_glass_is_not_looked_at_and_regions_are_placed_on_tissue(slide):
    with Slide.open(slide) as opened:
        tissue, (box,) = Tissue.of(opened), predicted_boxes(opened, "whole", PredictConfig())
        view = opened.window(box, 1.0)
        boxes = predicted_boxes(opened, "auto", PredictConfig(regions_per_slide=2, region_size_um=150))
    assert len(boxes) == 2
    assert all(box.x >= 100 and box.x + box.width <= 910 for box in boxes)
    assert tissue.shown(view, 100, 60, 50, 30)
    assert not tissue.shown(view, 100, 460, 50, 140)


def test_an_interrupted_prediction_goes_on_and_ends_the_same(checkpoint, slide, tmp_path, monkeypatch):
    predict_slide(checkpoint, slide, tmp_path / "whole.geojson", PredictConfig())
    done, real = Counter(), pieces

    def stop_at_the_second(probability, rows, *arguments):
        done[rows.start] += 1
        if len(done) == 2 and sum(done.values()) == 1 + done[0]:
            raise KeyboardInterrupt
        return real(probability, rows, *arguments)

    monkeypatch.setattr(predict_module, "pieces", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        predict_slide(checkpoint, slide, tmp_path / "cut.geojson", PredictConfig())
    assert not (tmp_path / "cut.geojson").exists()
    predict_slide(checkpoint, slide, tmp_path / "cut.geojson", PredictConfig())
    assert done[0] == len(spans(600, TRAINED_PX, TRAINED_PX // 4))
    assert (tmp_path / "cut.geojson").read_bytes() == (tmp_path / "whole.geojson").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_is_there_is_kept_or_refused(checkpoint, slide, tmp_path):
    out = tmp_path / "x.geojson"
    predict_slide(checkpoint, slide, out, PredictConfig())
    assert predict_slide(checkpoint, slide, out, PredictConfig()).areas is None
    whole = out.read_bytes()
    with pytest.raises(MismatchError, match=r"another prediction already: threshold was 0.5, now 0.7; give another"):
        predict_slide(checkpoint, slide, out, PredictConfig(threshold=0.7))
    with pytest.raises(MismatchError, match="another prediction already of other regions"):
        predict_slide(checkpoint, slide, out, PredictConfig(regions_per_slide=1), regions="auto")
    for content, message in (
        (whole.replace(b"tumour", b"Tumour"), "was changed since it was written"),
        (b'{"type": "FeatureCollection", "features": []}', "contains something else already"),
        (b"\x00" * 100, "contains something else already"),
    ):
        out.write_bytes(content)
        with pytest.raises(MismatchError, match=message):
            predict_slide(checkpoint, slide, out, PredictConfig())
        assert out.read_bytes() == content


@pytest.mark.parametrize("left", [0, 30, 0.5, -70, -1])
def test_a_file_that_was_cut_short_or_deleted_is_made_again(checkpoint, slide, tmp_path, left):
    out = tmp_path / "x.geojson"
    predict_slide(checkpoint, slide, out, PredictConfig())
    whole = out.read_bytes()
    out.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    with pytest.warns(CounterstainWarning, match=r"x\.geojson: was cut short; it is made again"):
        assert predict_slide(checkpoint, slide, out, PredictConfig()).areas == 2
    assert out.read_bytes() == whole
    out.unlink()
    assert predict_slide(checkpoint, slide, out, PredictConfig()).areas == 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore:.*cut short")
def test_a_damaged_prediction_is_one_line_or_ends_as_the_whole_one(checkpoint, slide, tmp_path, monkeypatch, seed):
    rng, out = np.random.default_rng(seed), tmp_path / "x.geojson"
    predict_slide(checkpoint, slide, tmp_path / "whole.geojson", PredictConfig())
    with monkeypatch.context() as patched:
        patched.setattr(predict_module, "join", None)
        with pytest.raises(TypeError):
            predict_slide(checkpoint, slide, out, PredictConfig())
    files = sorted((tmp_path / ".x.geojson.unfinished").iterdir())
    for file in rng.choice(files, 3, replace=False):
        content = np.frombuffer(file.read_bytes(), np.uint8).copy()
        content[rng.integers(len(content), size=3)] = rng.integers(256, size=3)
        file.write_bytes(content[: rng.choice([len(content), len(content) // 2])].tobytes())
    message = ""
    try:
        predict_slide(checkpoint, slide, out, PredictConfig())
    except CounterstainError as error:
        message = str(error)
    assert "\n" not in message
    assert message or out.read_bytes() == (tmp_path / "whole.geojson").read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_another_slide_of_the_same_name_and_size_is_noticed(checkpoint, slide, tmp_path, monkeypatch, finished):
    out, times = tmp_path / "x.geojson", slide.stat()
    with monkeypatch.context() as patched:
        if not finished:
            patched.setattr(predict_module, "join", None)
        with nullcontext() if finished else pytest.raises(TypeError):
            predict_slide(checkpoint, slide, out, PredictConfig())
    slide.write_bytes(slide.read_bytes().replace(bytes([170]), bytes([171])))
    os.utime(slide, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(MismatchError, match=r"file\.sample is another"):
        predict_slide(checkpoint, slide, out, PredictConfig())


def test_listed_regions_alone_are_predicted(checkpoint, slide, tmp_path):
    table = tmp_path / "regions.csv"
    header = "slide,x_level0_px,y_level0_px,width_level0_px,height_level0_px,region"
    table.write_text(f"{header}\nslide.tif,700,600,200,200,corner\nother,0,0,9,9,x\n")
    predict_slide(checkpoint, slide, tmp_path / "x.geojson", PredictConfig(), regions=str(table))
    (annotation,) = read_back(tmp_path / "x.geojson")
    assert annotation.polygon.centroid.distance(Point(800, 700)) < 1
    for row, message in {
        "slide,5000,0,10,10,off": r"region off of slide slide at x 5000, y 0 lies off its 1200 x 900 px",
        "other,0,0,10,10,a": "no region of slide 'slide'; add a row for it, or give --regions whole",
    }.items():
        table.write_text(f"{header}\n{row}\n")
        with pytest.raises(InputError, match=message):
            predict_slide(checkpoint, slide, tmp_path / "y.geojson", PredictConfig(), regions=str(table))


def test_coordinates_count_from_the_scanned_area_or_from_the_canvas(checkpoint, tmp_path):
    picture = disc(ground(320, 384), 160, 190, 90)
    path = write_mirax(tmp_path / "scan.mrxs", picture, offset_xy=(70, 150), mpp=0.5)
    corners = {}
    for origin in ("bounds", "canvas"):
        predict_slide(checkpoint, path, tmp_path / f"{origin}.geojson", PredictConfig(origin=origin))
        (annotation,) = read_back(tmp_path / f"{origin}.geojson")
        corners[origin] = np.array(annotation.polygon.bounds[:2])
    with Slide.open(path) as opened:
        x, y, _, _ = opened.bounds_level0_px
    assert (x, y) != (0, 0)
    np.testing.assert_allclose(corners["bounds"], (100, 70), atol=2)
    np.testing.assert_allclose(corners["canvas"] - corners["bounds"], (x, y), atol=0.02)


# Cohorts


def make_cohort(folder, origins, mpp: float = 1.0) -> Cohort:
    writer = CohortWriter(folder, HER2, mpp, {"kind": "test"})
    regions = []
    for number, origin in enumerate(origins):
        image = disc(ground(80, 100), 40, 50, 20)
        instances = np.zeros(image.shape[:2], np.int32)
        regions.append(
            Region(
                region=f"r{number}", slide="a/b", patient="p", image=image, instances=instances, subtypes={},
                mpp_level0=0.25, origin_xy_level0_px=origin,
            )
        )  # fmt: skip
    writer.add("a", regions)
    return writer.finish()


def test_a_cohort_gets_a_file_per_slide_in_level_0_pixels_or_per_region_without_a_place(checkpoint, tmp_path):
    cohort = make_cohort(tmp_path / "cohort", [(1000, 2000), (5000, 2000)])
    (prediction,) = predict_cohort(checkpoint, cohort, tmp_path / "out", PredictConfig())
    assert prediction.path.name.startswith("a_b-")
    centres = [a.polygon.centroid for a in read_back(prediction.path)]
    assert [(round(c.x), round(c.y)) for c in centres] == [(1200, 2160), (5200, 2160)]
    assert prediction.area_um2 == pytest.approx(2 * np.pi * 400, rel=0.02)
    (again,) = predict_cohort(checkpoint, cohort, tmp_path / "out", PredictConfig())
    assert again.areas is None
    prediction.path.write_bytes(prediction.path.read_bytes()[:-100])
    with pytest.warns(CounterstainWarning, match="was cut short"):
        assert predict_cohort(checkpoint, cohort, tmp_path / "out", PredictConfig())[0].areas == 2
    without_place = make_cohort(tmp_path / "without place", [(0, 0), (0, 0)])
    written = predict_cohort(checkpoint, without_place, tmp_path / "files", PredictConfig())
    assert [p.path.name for p in written] == ["r0.geojson", "r1.geojson"]


def test_a_cohort_of_another_resolution_or_origin_is_refused(checkpoint, tmp_path):
    cohort = make_cohort(tmp_path / "cohort", [(0, 0)], mpp=0.5)
    with pytest.raises(MismatchError, match=r"was trained at 1 um/px, .* is at 0.5 um/px; import the cohort at 1"):
        predict_cohort(checkpoint, cohort, tmp_path / "out", PredictConfig())
    with pytest.raises(InputError, match="does not know where its slides were scanned; give --origin canvas"):
        predict_cohort(checkpoint, cohort, tmp_path / "out", PredictConfig(origin="bounds"))


def test_a_cohort_may_be_open_and_goes_into_a_folder(checkpoint, tmp_path):
    cohort = make_cohort(tmp_path / "cohort", [(0, 0)])
    with pytest.raises(InputError, match="--out is the folder of one file per slide"):
        predict(checkpoint, cohort, out=tmp_path / "x.geojson")


# Ordinary images


def test_an_image_without_resolution_is_predicted_at_the_one_given_and_all_of_it(checkpoint, tmp_path):
    picture = disc(np.full((160, 200, 3), 250, np.uint8), 60, 80, 40)  # tumour on glass, at 0.5 um/px
    Image.fromarray(picture).save(tmp_path / "a.png")
    (found,) = predict(checkpoint, tmp_path / "a.png", out=tmp_path / "a.geojson", mpp_level0=0.5)
    assert found.area_um2 == pytest.approx(np.pi * 40**2 / 4, rel=0.02)
    (annotation,) = read_back(tmp_path / "a.geojson")
    assert annotation.polygon.centroid.distance(Point(80, 60)) < 0.6
    assert predict(checkpoint, tmp_path / "a.png", out=tmp_path / "a.geojson", mpp_level0=0.5)[0].areas is None
    with pytest.raises(MismatchError, match="another prediction already: mpp_level0 was"):
        predict(checkpoint, tmp_path / "a.png", out=tmp_path / "a.geojson", mpp_level0=1.0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif"])
def test_images_of_every_kind_have_the_same_outlines_as_in_a_cohort(checkpoint, tmp_path, suffix):
    cohort = make_cohort(tmp_path / "cohort", [(0, 0)])
    Image.fromarray(cohort.read(0)[0]).save(tmp_path / f"r0.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    predict(checkpoint, cohort, out=tmp_path / "whole")
    predict(checkpoint, tmp_path / f"r0.{suffix}", out=tmp_path / "r0.geojson", mpp_level0=1.0)
    (expected,) = read_back(next((tmp_path / "whole").glob("*.geojson")))
    (found,) = read_back(tmp_path / "r0.geojson")
    moved = shapely.transform(expected.polygon, lambda xy: xy / 4)  # the cohort's slide is at 0.25 um/px
    assert found.polygon.symmetric_difference(moved).area < 0.01 * moved.area


def test_a_folder_of_images_and_slides_gets_a_file_each_and_goes_on(checkpoint, slide, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    slide.rename(folder / "scan.tif")
    for name, shift in (("a.png", 0), ("b.JPG", 20)):
        Image.fromarray(disc(ground(120, 120), 50, 50 + shift, 20)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    found = predict(checkpoint, folder, out=tmp_path / "out", mpp_level0=0.5)
    assert [p.path.name for p in found] == ["a.geojson", "b.geojson", "scan.geojson"]
    assert [p.areas for p in found] == [1, 1, 2]
    (tmp_path / "out" / "b.geojson").unlink()
    again = predict(checkpoint, folder, out=tmp_path / "out", mpp_level0=0.5)
    assert [p.areas for p in again] == [None, 1, None]
    with pytest.raises(MismatchError, match=r"belongs to another run .*threshold was 0\.5, now 0\.9"):
        predict(checkpoint, folder, out=tmp_path / "out", mpp_level0=0.5, threshold=0.9)
    Image.new("RGB", (9, 9)).save(folder / "a.bmp")
    with pytest.raises(InputError, match=r"a\.bmp and a\.png are both slide 'a'; rename one"):
        predict(checkpoint, folder, out=tmp_path / "other", mpp_level0=0.5)


@pytest.mark.parametrize("name", ["broken.svs", "broken.png"])
def test_a_folder_with_a_slide_that_cannot_be_read_is_refused_before_anything_is_written(checkpoint, tmp_path, name):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / name).write_text("no slide")
    with pytest.raises(InputError, match=name):
        predict(checkpoint, tmp_path / "slides", out=tmp_path / "out", mpp_level0=0.5)
    assert not (tmp_path / "out").exists()


# Other programs


def test_a_qupath_project_has_slides_where_they_are_copies_of_images_and_their_outlines(checkpoint, slide, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "project"
    folder.mkdir()
    slide.rename(folder / "scan.tif")
    Image.fromarray(disc(ground(120, 120), 50, 60, 20)).save(folder / "a.png")
    found = predict(checkpoint, folder, out=out, format="qupath", mpp_level0=0.5)
    assert [(p.path.parent.name, p.areas) for p in found] == [("predictions", 1), ("predictions", 2)]
    project = json.loads((out / "project.qpproj").read_text())
    uris = {image["imageName"]: image["serverBuilder"]["uri"] for image in project["images"]}
    assert uris == {"a": (out / "images" / "a.ome.tif").as_uri(), "scan": (folder / "scan.tif").as_uri()}
    with Slide.open(out / "images" / "a.ome.tif") as copied:
        assert copied.mpp_level0 == 0.5
        assert np.array_equal(copied.read(0, 0, 120, 120, 0.5), np.asarray(Image.open(folder / "a.png")))
    (out / "project.qpproj").write_text("as QuPath saved it")
    assert [p.areas for p in predict(checkpoint, folder, out=out, format="qupath", mpp_level0=0.5)] == [None, None]
    assert (out / "project.qpproj").read_text() == "as QuPath saved it"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ome_zarr|zarr|dask")
@pytest.mark.parametrize("origin", [None, "canvas"])
def test_an_ome_zarr_store_of_a_slide_shows_what_was_outlined(checkpoint, tmp_path, origin):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    picture = disc(ground(320, 384), 160, 190, 90)
    write_mirax(tmp_path / "scan.mrxs", picture, offset_xy=(70, 150), mpp=0.5)
    predict(checkpoint, tmp_path / "scan.mrxs", out=tmp_path / "out", format="ome-zarr", origin=origin)
    image, *_, labels = Reader(parse_url(tmp_path / "out" / "scan.ome.zarr"))()
    assert image.data[0].shape == (3, 160, 192)
    assert image.metadata["coordinateTransformations"][0][0]["scale"] == [1, 1, 1]
    shown = np.asarray(labels.data[0])
    assert iou(shown == 1, np.asarray(image.data[0])[1] < 128) > 0.98
    assert labels.metadata["color"][1] == [200 / 255, 0, 0, 1]
    assert labels.metadata["properties"][1]["class"] == "tumour"
    assert labels.metadata["properties"][1]["area_um2"] == pytest.approx(np.pi * 90**2 / 4, rel=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ome_zarr|zarr|dask")
def test_of_a_cohort_every_region_is_a_store_of_its_own(checkpoint, tmp_path):
    import zarr

    cohort = make_cohort(tmp_path / "cohort", [(1000, 2000), (5000, 2000)])
    for _ in range(2):
        predict(checkpoint, cohort, out=tmp_path / "out", format="ome-zarr")
    for position in range(2):
        store = zarr.open_group(tmp_path / "out" / f"r{position}.ome.zarr", mode="r")
        image, _ = cohort.read(position)
        assert np.array_equal(np.moveaxis(store["0"][:], 0, -1), image)
        assert np.array_equal(store["labels/prediction/0"][:] == 1, image[..., 1] < 128)
    with pytest.raises(InputError, match=r"then 'counterstain predict SEGMENTER PROJECT/images --out PROJECT/pred"):
        predict(checkpoint, cohort, out=tmp_path / "project", format="qupath")


# The command line


def test_the_command_says_what_it_wrote(run, checkpoint, slide, tmp_path):
    out = tmp_path / "x.geojson"
    status, printed, _ = run("predict", checkpoint, slide, "--out", out)
    assert (status, printed) == (0, f"{out}: 2 areas of tumour, 0.046 mm² in all\n")
    assert run("predict", checkpoint, slide, "--out", out)[1] == f"{out}: is there already\n"


def test_bad_input_is_one_line_and_status_2(run, checkpoint, slide, tmp_path):
    plain = tmp_path / "plain.tif"
    Image.new("RGB", (40, 40)).save(plain)
    (tmp_path / "text.svs").write_text("no slide")
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 40)).save(image)
    out = ("--out", tmp_path / "x.geojson")
    for words, message in (
        ((tmp_path / "none.svs", *out), "none.svs: no such slide file"),
        ((tmp_path / "text.svs", *out), "text.svs: not a slide that can be read"),
        ((plain, *out), "plain.tif: the file has no resolution; give it with --mpp-level0"),
        ((tmp_path, *out), "here it is a folder, with a file for each image; give it another name"),
        ((tmp_path / "none.png", *out), "none.png: no such slide file"),
        ((image, *out), "image.png: the file has no resolution; give it with --mpp-level0"),
        (
            (image, *out, "--mpp-level0", 1, "--regions", "auto"),
            "--regions is for slides; all of an image is predicted",
        ),
        ((tmp_path / "segmenter", "--out", tmp_path / "out"), "segmenter: no slide in it; expected files ending in"),
        ((slide, *out, "--format", "svg"), "--format svg: expected geojson, qupath, ome-zarr"),
        ((slide, "--out", tmp_path / "q", "--format", "qupath", "--origin", "canvas"), "leave out --origin canvas"),
        ((slide, "--out", tmp_path / "x.csv"), "expected the name of a file that ends in .geojson"),
        ((slide, *out, "--threshold", 2), "threshold: Input should be less than 1 (got 2.0)"),
        ((slide, *out, "--regions", tmp_path / "none.csv"), "none.csv: no such file; expected a CSV table"),
    ):
        status, printed, error = run("predict", checkpoint, *words)
        assert (status, printed, error.count("\n")) == (2, "", 1), error
        assert error.startswith("error: ")
        assert message in error
    assert not list(tmp_path.glob("*.geojson"))


def test_whatever_a_network_says_can_be_read_back(checkpoint, slide, tmp_path, monkeypatch):
    monkeypatch.undo()  # random weights outline thousands of specks
    config = PredictConfig(regions_per_slide=1, region_size_um=60)
    written = predict_slide(checkpoint, slide, tmp_path / "x.geojson", config, regions="auto")
    file = read_annotations(tmp_path / "x.geojson", "qupath")
    assert (len(file.annotations), file.repaired, file.skipped) == (written.areas, 0, Counter())
