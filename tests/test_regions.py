from pathlib import Path

import numpy as np
import pytest
import shapely
from shapely import Polygon

from counterstain.errors import InputError
from counterstain.io.regions import drawn_boxes, place_boxes, read_region_table
from counterstain.io.slides import Box

SCAN = Box(1000, 500, 20_000, 10_000)
HEADER = "slide,region,x_level0_px,y_level0_px,width_level0_px,height_level0_px\n"


def place(polygons: list[Polygon], count: int = 3, **options) -> list[Box]:
    return place_boxes(polygons, count=count, edge=2000, extent=SCAN, **options)


def covered(box: Box, polygon: Polygon) -> float:
    return box.polygon.intersection(polygon).area / polygon.area


def test_regions_cover_what_is_annotated():
    nests = [shapely.Point(x, y).buffer(300) for x, y in [(5000, 4000), (9000, 9000)]]
    nests.append(shapely.box(20_900, 10_450, 21_000, 10_500))  # at the far corner
    boxes = place(nests)
    assert [max(covered(box, nest) for box in boxes) for nest in nests] == pytest.approx([1, 1, 1])
    assert place(nests) == boxes


def test_a_lone_instance_lies_in_the_middle_of_its_region():
    (box,) = place([shapely.Point(9000, 5000).buffer(200)])
    assert (box.x, box.y) == pytest.approx((8000, 4000), abs=100)


def test_there_are_no_more_regions_than_annotated_places_on_the_slide():
    assert len(place([shapely.Point(4000, 4000).buffer(200)], count=10)) == 1
    assert place([]) == place([shapely.box(-900, -900, -100, -100)]) == []


def test_regions_lie_side_by_side_and_stay_on_the_scanned_area():
    boxes = place([shapely.box(900, 400, 21_500, 11_000)], count=40)
    assert len(boxes) > 30
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(SCAN.x <= b.x and b.x + b.width <= SCAN.x + SCAN.width for b in boxes)
    assert all(SCAN.y <= b.y and b.y + b.height <= SCAN.y + SCAN.height for b in boxes)


@pytest.mark.parametrize("width", [635, 650, 959])
def test_regions_moved_back_from_the_edge_do_not_overlap(width):
    boxes = place_boxes([shapely.box(0, 0, width, 340)], count=9, edge=320, extent=Box(0, 0, width, 340))
    assert boxes
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_most_annotated_area_comes_first_unless_weights_bring_rare_subtypes_in():
    rare, common = shapely.Point(4000, 4000).buffer(200), shapely.Point(15_000, 6000).buffer(600)
    first, second = place([rare, common], count=2)
    assert first.x > 10_000 > second.x
    assert place([rare, common], count=1, weights=[50, 1])[0].x < 10_000


def test_annotated_tissue_goes_before_annotated_glass():
    tissue = np.zeros((100, 200), bool)
    tissue[:, 100:] = True
    nests = [shapely.Point(4000, 4000).buffer(400), shapely.Point(15_000, 6000).buffer(390)]
    assert place(nests, count=1)[0].x < 10_000
    assert place(nests, count=1, tissue=tissue)[0].x > 10_000


def test_a_slide_smaller_than_a_region_is_one_region():
    boxes = place_boxes([shapely.box(50, 50, 90, 90)], count=3, edge=2000, extent=Box(10, 20, 700, 500))
    assert boxes == [Box(10, 20, 700, 500, "region1")]


def test_drawn_rectangles_are_numbered_from_the_top():
    boxes = drawn_boxes("a", [shapely.box(5, 100, 25, 130), shapely.box(50.2, 3.4, 60, 9)])
    assert boxes == [Box(50, 3, 10, 6, "region1"), Box(5, 100, 20, 30, "region2")]


@pytest.mark.parametrize("outline", [[(0, 0), (10, 0), (0, 10)], [(0, 0), (200, 0), (210, 99), (10, 99)]])
def test_a_region_that_is_no_upright_rectangle_is_an_error(outline):
    with pytest.raises(InputError, match=r"slide a: the outline of a region at x 0, y 0 is no upright rectangle"):
        drawn_boxes("a", [Polygon(outline)])


def test_a_table_lists_regions_by_slide(tmp_path: Path):
    (tmp_path / "r.csv").write_text(HEADER + "a,,10,20,300,400\na,left,1e3,5,6.2,7\nb,,0,0,5,5\n")
    assert read_region_table(tmp_path / "r.csv") == {
        "a": [Box(10, 20, 300, 400, "region1"), Box(1000, 5, 6, 7, "left")],
        "b": [Box(0, 0, 5, 5, "region1")],
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("slide,x\na,1\n", r"r.csv: no column 'x_level0_px'; expected slide, x_level0_px"),
        (HEADER + "a,,ten,1,2,3\n", r"r.csv row 2: x_level0_px is 'ten'; expected a number of level-0 pixels"),
        (HEADER + "a,,inf,1,2,3\n", r"r.csv row 2: x_level0_px is 'inf'; expected a number"),
        (HEADER + "a,,1,1,2,0\n", r"r.csv row 2: a region of 2 x 0 px; expected"),
        (HEADER + "a,x,1,1,2,3\na,x,1,1,2,3\n", r"r.csv row 3: slide a already has a region 'x'; rename one"),
        ("", r"r.csv: the table is empty"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path: Path, content: str, words: str):
    (tmp_path / "r.csv").write_text(content)
    with pytest.raises(InputError, match=words):
        read_region_table(tmp_path / "r.csv")
