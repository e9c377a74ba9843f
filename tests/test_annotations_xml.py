import numpy as np
import pytest
import shapely

from counterstain.errors import InputError
from counterstain.io.annotations import read_annotations, xml_formats

BOMB = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;">]>'
    '<Annotations><Annotation Name="&c;"/></Annotations>'
)
OUTSIDE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><Annotations><Annotation Name="&b;"/></Annotations>'
SQUARE = [(10, 10), (30, 10), (30, 30), (10, 30)]


def read(tmp_path, text, file_format):
    path = tmp_path / "a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_annotations(path, file_format)


def asap(*annotations):
    return f"<ASAP_Annotations><Annotations>{''.join(annotations)}</Annotations></ASAP_Annotations>"


def asap_annotation(points=SQUARE, kind="Polygon", group="tumor", name="_0"):
    coordinates = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(points))
    head = f'<Annotation Name="{name}" Type="{kind}" PartOfGroup="{group}">'
    return f"{head}<Coordinates>{coordinates}</Coordinates></Annotation>"


def aperio(*layers):
    return f'<Annotations MicronsPerPixel="0.25">{"".join(layers)}</Annotations>'


def layer(*regions, attributes="", **named):
    head = " ".join(f'{key}="{value}"' for key, value in {"Id": 1, **named}.items())
    return f"<Annotation {head}><Attributes>{attributes}</Attributes><Regions>{''.join(regions)}</Regions></Annotation>"


def region(points=SQUARE, kind=0, vertex="Vertex", **named):
    head = " ".join(f'{key}="{value}"' for key, value in {"Id": 1, "Type": kind, **named}.items())
    vertices = "".join(f'<{vertex} X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    return f"<Region {head}><Vertices>{vertices}</Vertices></Region>"


def test_asap_kinds_become_polygons_with_name_and_group_and_dots_are_counted(tmp_path):
    kinds = ("Polygon", "Rectangle", "Dot", "None")
    annotations = (asap_annotation(kind=kind, name=kind) for kind in kinds)
    remark = "a long remark " * 99
    file = read(tmp_path, asap(*annotations, asap_annotation(group="None", name=remark)), "asap")
    assert [a.id[:13] for a in file.annotations] == ["Polygon", "Rectangle", "a long remark"]
    assert {a.polygon.bounds for a in file.annotations} == {(10, 10, 30, 30)}
    assert file.labels == {"tumor": 2, "Ungrouped": 1}
    assert file.skipped == {"point": 1, "annotation without a type": 1}


def distance(one, other):
    return shapely.hausdorff_distance(shapely.LinearRing(one), shapely.LinearRing(other))


def centripetal(p0, p1, p2, p3, steps=2000):
    """Return the piece from p1 to p2 of a centripetal Catmull-Rom curve by its recursion (Barry and Goldman, 1988)."""
    points = np.array([p0, p1, p2, p3], float)
    knots = np.append(0, np.cumsum(np.hypot(*np.diff(points, axis=0).T) ** 0.5))
    t = np.linspace(knots[1], knots[2], steps)[:, None]
    level = [np.broadcast_to(point, (steps, 2)) for point in points]
    for spans in ([(0, 1), (1, 2), (2, 3)], [(0, 2), (1, 3)], [(1, 2)]):
        ends = [(knots[i], knots[j]) for i, j in spans]
        level = [((b - t) * x + (t - a) * y) / (b - a) for (a, b), x, y in zip(ends, level, level[1:], strict=False)]
    return level[0]


def test_splines_are_the_curves_that_asap_shows_and_are_counted(tmp_path):
    p = [(0, 0), (800, 60), (1300, 700), (900, 1500), (200, 900)]
    asap_curve = [
        centripetal(p[4], p[0], p[1], p[2]),
        centripetal(p[0], p[1], p[2], p[3]),
        centripetal(p[1], p[2], p[3], p[4]),
        centripetal(p[2], p[3], p[4], (-500, 300)),  # beside the last point ASAP mirrors the other end
        centripetal((400, 1800), p[4], p[0], p[1]),
    ]
    file = read(tmp_path, asap(asap_annotation(p, "Spline"), asap_annotation([*p, p[0]], "Spline")), "asap")
    for annotation in file.annotations:
        assert distance(annotation.polygon.exterior.coords, np.concatenate(asap_curve)) < 0.2
        assert distance(annotation.polygon.exterior.coords, p) > 50
    assert file.splines == 2


def test_a_spline_through_points_on_a_circle_is_close_to_the_circle_and_few_points_have_no_area(tmp_path):
    angle = np.arange(64) * np.pi / 32
    circle = np.stack([np.cos(angle), np.sin(angle)], 1) * 1000 + 2000
    doubled = np.repeat(circle, 2, axis=0)
    (annotation,) = read(tmp_path, asap(asap_annotation(doubled.tolist(), "Spline")), "asap").annotations
    assert annotation.polygon.area == pytest.approx(np.pi * 1000**2, rel=2e-4)
    few = [asap_annotation(points, "Spline") for points in ([], [(1, 1)], [(1, 1), (9, 9), (1, 1)])]
    assert read(tmp_path, asap(asap_annotation(), *few), "asap").skipped == {"outline without area": 3}


def test_asap_points_are_taken_in_their_order(tmp_path):
    crossed = [SQUARE[i] for i in (0, 2, 1, 3)]
    text = asap_annotation(crossed).replace('Order="1"', 'Order="1.5"').replace('Order="2"', 'Order="1"')
    (annotation,) = read(tmp_path, asap(text), "asap").annotations
    assert annotation.polygon.area == 400


@pytest.mark.parametrize(
    ("attributes", "named", "text", "label"),
    [
        ("", {"Name": "Tumor"}, "note", "Tumor"),
        ('<Attribute Name="Description" Value="Tumor"/>', {"Name": ""}, "note", "Tumor"),
        ('<Attribute Name="CaP" Value=""/>', {"Name": ""}, "note", "CaP"),
        ('<Attribute Name="Description" Value=""/>', {}, "note", "note"),
        ("", {"Id": 4}, "", "layer 4"),
    ],
)
def test_aperio_layers_are_named_as_well_as_they_can_be(tmp_path, attributes, named, text, label):
    file = read(tmp_path, aperio(layer(region(Text=text), attributes=attributes, **named)), "aperio")
    assert file.labels == {label: 1}


def test_aperio_shapes_given_by_their_box_are_drawn_and_others_are_what_their_points_show(tmp_path):
    corners, triangle = [(10, 10), (30, 20)], [(0, 0), (10, 0), (0, 10)]
    regions = region(corners, 1), region(corners, 2), region(triangle, 1), region(kind=3)
    file = read(tmp_path, aperio(layer(*regions)), "aperio")
    assert [a.polygon.area for a in file.annotations] == pytest.approx([200, 3.1416 * 10 * 5, 50], rel=1e-3)
    assert file.skipped == {"arrow": 1}


@pytest.mark.parametrize("points", [SQUARE, [SQUARE[i] for i in (0, 1, 3, 2)], [SQUARE[i] for i in (0, 2, 1, 3, 0)]])
def test_the_corners_of_a_rectangle_may_come_in_any_order(tmp_path, points):
    texts = {"asap": asap(asap_annotation(points, "Rectangle")), "aperio": aperio(layer(region(points, 1)))}
    for file_format, text in texts.items():
        file = read(tmp_path, text, file_format)
        assert ([a.polygon.area for a in file.annotations], file.repaired) == ([400], 0)


def test_aperio_negative_regions_are_cut_out_of_their_layer_alone(tmp_path):
    hole = region([(15, 15), (20, 15), (20, 20), (15, 20)], Id=2, NegativeROA=1)
    stray = region([(90, 90), (95, 90), (95, 95)], Id=3, NegativeROA=1)
    covered = layer(region(), region(NegativeROA="1"), Id=3)
    file = read(tmp_path, aperio(layer(region(), hole, stray), layer(region(), Id=2), covered), "aperio")
    assert {a.id: a.polygon.area for a in file.annotations} == {"1/1": 400 - 25, "2/1": 400}
    assert file.skipped == {
        "negative region outside every region of its layer": 1,
        "region wholly inside negative regions": 1,
    }


def test_where_a_shape_is_named_the_type_is_only_the_number_of_the_class(tmp_path):
    shapes = ("Rectangle", "Polygon", "Ellipse", "Points", "Polyline", "Area")
    regions = [region(kind=2, GeoShape=shape, Text="Tumor") for shape in shapes]
    file = read(tmp_path, aperio(layer(*regions)), "aperio")
    assert [a.polygon.area for a in file.annotations] == pytest.approx([400, 400, 314.1], rel=1e-3)
    assert file.skipped == {"points": 1, "polyline": 1, "region of the unknown shape 'Area'": 1}


def test_layers_of_halo_are_read_with_their_shapes_and_holes(tmp_path):
    def halo(points, kind, negative=0):
        return region(points, kind, vertex="V", NegativeROA=negative, HasEndcaps=0)

    corners = [(40, 40), (60, 50)]
    hole = halo([(12, 12), (16, 16)], "Rectangle", 1)
    regions = halo(SQUARE, "Polygon"), hole, halo(corners, "Ellipse"), halo(corners, "Ruler"), halo([(1, 1)], "Pin")
    text = layer(*regions, Id="", Name="Layer 1", Visible="True")
    file = read(tmp_path, f"<Annotations>{text}</Annotations>", "halo")
    assert [a.polygon.area for a in file.annotations] == pytest.approx([400 - 16, np.pi * 10 * 5], rel=1e-3)
    assert (file.labels, file.skipped) == ({"Layer 1": 2}, {"ruler": 1, "pin": 1})
    with pytest.raises(InputError, match="looks like halo, not aperio; give --format halo"):
        read_annotations(tmp_path / "a.xml", "aperio")


@pytest.mark.parametrize(
    ("file_format", "text", "message"),
    [
        ("asap", asap(asap_annotation(), asap_annotation([("nan", 0), *SQUARE])), "line 1 X: expected a coordinate"),
        ("asap", asap(asap_annotation(), asap_annotation(kind="Blob")), "unknown Type 'Blob'"),
        ("asap", asap(asap_annotation(), asap_annotation(group="x" * 300)), "PartOfGroup: expected a name of at most"),
        ("aperio", aperio(layer(region(), region([("x", 1), *SQUARE]))), "X: expected a coordinate .* found 'x'"),
        ("aperio", aperio(layer(region(), Name="T"), layer(region(), Name="x" * 300)), "Name: expected a name"),
        ("aperio", aperio(layer(region()), layer(region(Text="remark " * 99))), "Text: expected a name"),
    ],
)
def test_one_odd_object_is_left_out_counted_and_described(tmp_path, file_format, text, message):
    file = read(tmp_path, text, file_format)
    assert (len(file.annotations), sum(file.skipped.values())) == (1, 1)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(*file.odd)


def test_long_remarks_of_a_named_layer_do_not_matter(tmp_path):
    described = f'<Attribute Name="Description" Value="{"remark " * 99}"/>'
    file = read(tmp_path, aperio(layer(region(Text="remark " * 99), attributes=described, Name="Tumor")), "aperio")
    assert (file.labels, file.skipped) == ({"Tumor": 1}, {})


def test_a_negative_region_that_cannot_be_read_refuses_the_file_since_its_hole_would_be_filled(tmp_path):
    for hole in (region([("x", 1)], NegativeROA=1), region(kind=7, NegativeROA=1)):
        with pytest.raises(InputError, match="negative region"):
            read(tmp_path, aperio(layer(region(), region(), hole)), "aperio")


@pytest.mark.parametrize(
    "encoding",
    ["UTF-7", "klingon", "hex", "rot13", "utf-16", "utf-32", "shift_jis", "idna", "punycode", "undefined", "gb18030"],
)
def test_an_encoding_that_is_not_read_is_one_line(tmp_path, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>{aperio(layer(region(), Name="ä+AGE-"))}'
    with pytest.raises(InputError, match=r"save it as UTF-8|not XML or cut short") as caught:
        read(tmp_path, text, "aperio")
    assert "\n" not in str(caught.value)


def test_holes_that_would_take_hours_to_cut_out_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(xml_formats, "MAX_CUTS", 9)
    with pytest.raises(InputError, match="line 1: more than 9 holes to cut out of regions"):
        read(tmp_path, aperio(layer(*[region()] * 4, *[region(NegativeROA=1)] * 4)), "aperio")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aperio(layer(region()))[:-30], r"line 1: not XML or cut short"),
        (
            "<Annotations>\n" + layer(region([(0, 0), ("x", 1), (1, 1)])) + "</Annotations>",
            r"line 2 X: expected a coordinate .* found 'x'",
        ),
        (aperio(layer(region([("nan", 0)]))), "expected a coordinate .* found 'nan'"),
        (aperio(layer(region([("1e9", 0)]))), "at most 10,000,000 either way, found '1e9'"),
        (aperio(layer(region())).replace(' Y="10"', ""), "Y: the coordinate is missing"),
        (aperio(layer(region(), Name="x" * 300)), "Name: expected a name of at most 200 characters"),
        (aperio(layer(region(NegativeROA="yes"))), "line 1: NegativeROA is 'yes', expected 0 or 1"),
        ("<Annotations>" + "<a>" * 1000, "line 1: nested too deep"),
        (BOMB, "has a document type or entities of its own"),
        (OUTSIDE, "has a document type or entities of its own"),
        (b'<?xml version="1.0" encoding="klingon"?><Annotations/>', "encoding 'klingon', which is not read; save it"),
        (b"<Annotations><Annotation Name='\xff'/></Annotations>", "line 1: not XML or cut short"),
    ],
)
def test_aperio_faults_are_named_with_their_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text, "aperio")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (asap(asap_annotation(kind="Blob")), "line 1: unknown Type 'Blob'; expected one of Polygon, Rectangle, Spline"),
        (asap(asap_annotation([("inf", 0)])), "X: expected a coordinate"),
        (asap(asap_annotation()).replace('Order="1"', 'Order="one"'), "Order: expected"),
    ],
)
def test_asap_faults_are_named_with_their_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text, "asap")
