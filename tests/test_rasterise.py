import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from counterstain.io import regions as module
from counterstain.io.regions import place, rasterise
from counterstain.io.slides import Box
from counterstain.seeding import numpy_generator


def by_centres(polygon, shape):
    """Ask shapely, pixel by pixel."""
    rows, columns = np.indices(shape) + 0.5
    return shapely.contains_xy(polygon, columns, rows)


def blob(seed, centre, radius, points=60):
    rng = numpy_generator(seed)
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    distance = radius * (1 + 0.3 * np.sin(3 * angle + rng.uniform(0, 6)) + rng.uniform(-0.1, 0.1, points))
    return shapely.Polygon(centre + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1))


@pytest.mark.parametrize("seed", range(20))
def test_a_pixel_belongs_to_what_its_centre_lies_in(seed):
    shape = (40, 50)
    drawn = blob(seed, numpy_generator(seed, "centre").uniform(-5, 50, 2), 15).difference(blob(seed + 1, (20, 20), 6))
    polygon = shapely.make_valid(drawn)
    assert np.array_equal(rasterise([(3, polygon)], shape) == 3, by_centres(polygon, shape))


def test_holes_stay_empty_and_what_lies_in_them_shows():
    ring = shapely.box(0, 0, 10, 10).difference(shapely.box(3, 3, 7, 7))
    painted = rasterise([(1, ring), (2, shapely.box(4, 4, 6, 6))], (10, 10))
    assert {i: int((painted == i).sum()) for i in (0, 1, 2)} == {0: 12, 1: 84, 2: 4}


def test_polygons_that_touch_share_no_pixel_and_leave_none_out():
    cells = shapely.voronoi_polygons(
        shapely.MultiPoint(numpy_generator(0).uniform(0, 60, (80, 2))), extend_to=shapely.box(0, 0, 60, 60)
    )
    shares = [rasterise([(1, cell)], (60, 60)) for cell in cells.geoms]
    assert np.array_equal(np.sum(shares, axis=0), np.ones((60, 60)))


def test_edges_through_pixel_centres_are_shared_out_exactly_too():
    left, right = shapely.Polygon([(0, 0), (4.5, 0), (0.5, 4), (0, 4)]), shapely.Polygon([(4.5, 0), (8, 4), (0.5, 4)])
    shares = [rasterise([(1, polygon)], (4, 8)) for polygon in (left, right)]
    assert np.sum(shares, axis=0).max() == 1
    whole = rasterise([(1, shapely.union(left, right))], (4, 8))
    assert np.array_equal(np.sum(shares, axis=0), whole)


def test_the_largest_is_painted_first_then_the_lower_id_whatever_the_order():
    small, large = (9, shapely.box(2, 2, 4, 4)), (5, shapely.box(0, 0, 6, 6))
    drawn = [small, large, (7, large[1])]
    painted = rasterise(drawn, (6, 6))
    assert np.array_equal(painted, rasterise(drawn[::-1], (6, 6)))
    assert (painted[3, 3], painted[0, 0]) == (9, 7)


@pytest.mark.parametrize(
    ("instances", "pixels"),
    [
        ([], 0),
        ([(1, (0.6, 0.6, 0.9, 0.9))], 0),  # no centre lies in it
        ([(1, (-50, -50, 50, 50))], 36),
        ([(1, (-9, 0, -1, 5)), (2, (8, 0, 99, 5))], 0),
        ([(7, (0, 0, 6, 6)), (0, (2, 2, 4, 4))], 32),  # background inside an instance
    ],
)
def test_only_what_lies_inside_is_painted_and_background_is_cut_out(instances, pixels):
    assert np.count_nonzero(rasterise([(i, shapely.box(*box)) for i, box in instances], (6, 6))) == pixels


def test_bands_and_batches_change_nothing(monkeypatch):
    instances = [(i, blob(i, numpy_generator(i, "at").uniform(0, 60, 2), 12)) for i in range(1, 40)]
    whole = rasterise(instances, (60, 61))
    monkeypatch.setattr(module, "CROSSINGS_AT_ONCE", 50)
    monkeypatch.setattr(module, "POINTS_AT_ONCE", 100)
    assert np.array_equal(rasterise(instances, (60, 61)), whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 24), st.integers(-4, 24)), min_size=1, max_size=9))
def test_outlines_on_the_grid_of_pixels_fill_their_area(corners):
    outline = shapely.union_all([shapely.box(x, y, x + 3, y + 2) for x, y in corners])
    painted = rasterise([(1, outline)], (20, 20))
    assert painted.sum() == shapely.area(shapely.intersection(outline, shapely.box(0, 0, 20, 20)))


def test_outlines_are_moved_into_the_pixels_of_a_region():
    placed = place([shapely.box(120, 220, 140, 240)], Box(100, 200, 80, 80, "a"), 2.0)
    assert placed.polygons[0].bounds == (10, 10, 20, 20)
    assert placed.cut == 0


def test_what_is_cut_is_counted_and_what_is_outside_is_left_out():
    boxes = [(0, 0, 5, 5), (8, 8, 12, 12), (10, 0, 12, 5), (50, 50, 60, 60), (0, 0, 10, 10)]
    placed = place([shapely.box(*b) for b in boxes], Box(0, 0, 10, 10, "a"))
    assert (placed.cut, placed.shown) == (1, [0, 1, 4])
    assert placed.polygons[1].bounds == boxes[1]


def test_the_region_of_an_empty_slide_places_nothing():
    assert place([], Box(0, 0, 10, 10, "a")).polygons == []


def test_a_map_painted_in_pieces_equals_the_whole():
    drawn = [(i, blob(i, numpy_generator(i, "centre").uniform(0, 200, 2), 25)) for i in range(1, 30)]
    window = module.InstanceWindow(drawn, (200, 210))
    pieces = [[window.read(y, x, min(37, 200 - y), 105) for x in (0, 105)] for y in range(0, 200, 37)]
    assert np.array_equal(np.block(pieces), rasterise(drawn, (200, 210)))
