import pytest

from counterstain.errors import InputError
from counterstain.io.annotations import read_annotations

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


def region(points=SQUARE, kind=0, **named):
    head = " ".join(f'{key}="{value}"' for key, value in {"Id": 1, "Type": kind, **named}.items())
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    return f"<Region {head}><Vertices>{vertices}</Vertices></Region>"


def test_asap_kinds_become_polygons_with_name_and_group_and_dots_are_counted(tmp_path):
    kinds = ("Polygon", "Rectangle", "Spline", "Dot")
    annotations = (asap_annotation(kind=kind, name=kind) for kind in kinds)
    file = read(tmp_path, asap(*annotations, asap_annotation(group="None")), "asap")
    assert [a.id for a in file.annotations] == ["Polygon", "Rectangle", "Spline", "_0"]
    assert {a.polygon.bounds for a in file.annotations} == {(10, 10, 30, 30)}
    assert (file.labels, file.skipped) == ({"tumor": 3, "Ungrouped": 1}, {"point": 1})


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aperio(layer(region()))[:-30], r"line 1: not XML or cut short"),
        (
            "<Annotations>\n" + layer(region([(0, 0), ("x", 1), (1, 1)])),
            r"line 2 X: expected a coordinate .* found 'x'",
        ),
        (aperio(layer(region([("nan", 0)]))), "expected a coordinate .* found 'nan'"),
        (aperio(layer(region([("1e9", 0)]))), "at most 10,000,000 either way, found '1e9'"),
        (aperio(layer(region())).replace(' Y="10"', ""), "Y: the coordinate is missing"),
        (aperio(layer(region(), Name="x" * 300)), "Name: expected a name of at most 200 characters"),
        ("<Annotations>" + "<a>" * 1000, "line 1: nested too deep"),
        (BOMB, "has a document type or entities of its own"),
        (OUTSIDE, "has a document type or entities of its own"),
        (b'<?xml version="1.0" encoding="klingon"?><Annotations/>', "not XML or cut short"),
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
