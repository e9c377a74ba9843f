import numpy as np
import pytest

from counterstain.config import build
from counterstain.errors import ConfigError, InputError, TaxonomyError
from counterstain.taxonomy import IGNORE, Taxonomy, colours

HER2 = Taxonomy.named("her2")


def subtypes(*names):
    return [{"id": i, "name": name, "colour": "#112233"} for i, name in enumerate(names, start=1)]


def test_the_her2_taxonomy_leaves_the_composite_class_out_of_the_variance():
    assert HER2.names == ("HER2 0", "HER2 1+", "HER2 2+", "HER2 3+", "LCIS/DCIS")
    assert HER2.counted_ids == (1, 2, 3, 4)
    assert HER2.num_labels == 6


def test_names_and_ids_belong_together():
    assert [HER2.id_of(name) for name in HER2.names] == [1, 2, 3, 4, 5]
    assert [HER2.name_of(i) for i in (0, 2, IGNORE)] == ["background", "HER2 1+", "ignore"]


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(TaxonomyError, match=r"unknown subtype 'HER2 4\+'; her2 has HER2 0, HER2 1\+"):
        HER2.id_of("HER2 4+")


def test_a_merge_is_a_coarser_taxonomy_and_a_lookup():
    assert HER2.merged("stained").names == ("non-stained", "stained", "LCIS/DCIS")
    assert HER2.merged("stained").counted_ids == (1, 2)
    labels = np.array([0, 1, 2, 3, 4, 5, IGNORE])
    assert HER2.merge_lookup("stained")[labels].tolist() == [0, 1, 2, 2, 2, 3, IGNORE]


def test_an_unknown_merge_is_told_the_known_ones():
    with pytest.raises(InputError, match="unknown merge 'stain'; her2 has stained"):
        HER2.merged("stain")


@pytest.mark.parametrize("ids", [(1, 1), (0, 1), (2, 1), (1, 3)])
def test_ids_must_count_from_one(ids):
    content = [{"id": i, "name": f"n{k}", "colour": "#112233"} for k, i in enumerate(ids)]
    with pytest.raises(ConfigError, match=r"subtype ids must be 1, 2, …|greater than or equal to 1"):
        build(Taxonomy, {"name": "t", "subtypes": content})


def test_names_must_differ():
    with pytest.raises(ConfigError, match=r"^t.yaml: subtype names must differ"):
        build(Taxonomy, {"name": "t", "subtypes": subtypes("a", "a")}, "t.yaml")


def test_a_merge_must_hold_every_subtype_once():
    merges = {"m": {"x": ["a"]}}
    with pytest.raises(ConfigError, match="merge 'm' must hold every subtype once"):
        build(Taxonomy, {"name": "t", "subtypes": subtypes("a", "b"), "merges": merges})


def test_a_taxonomy_is_read_from_a_file(tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\nsubtypes: [{id: 1, name: a, colour: '#112233'}]\n")
    taxonomy = Taxonomy.load(tmp_path / "t.yaml")
    assert taxonomy.names == ("a",)
    assert taxonomy.palette[[0, 1, IGNORE]].tolist() == [[255] * 3, [0x11, 0x22, 0x33], [128] * 3]


def test_files_in_the_way_do_not_hide_a_built_in_taxonomy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "her2").write_text("notes")
    (tmp_path / "mine").write_text("name: t\nsubtypes: [{id: 1, name: a, colour: '#112233'}]\n")
    assert Taxonomy.load("her2") == HER2
    assert Taxonomy.load("mine").names == ("a",)


def test_a_taxonomy_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(TaxonomyError, match="taxonomy 'her3': not built in"):
        Taxonomy.load("her3")
    with pytest.raises(ConfigError, match="no such file"):
        Taxonomy.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("count", [1, 6, 7, 12, 40])
def test_colours_are_distinct(count):
    assert len(set(colours(count))) == count


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    (tmp_path / "t.yaml").write_text(
        "name: t\nsubtypes: [{id: 1, name: a, colour: '#112233'}, {id: 3, name: a, colour: '#112233'}]\n"
        "merges: {m: {x: [b]}}\n"
    )
    with pytest.raises(ConfigError, match=r"found \[1, 3\]; subtype names must differ, found .*; merge 'm' must hold"):
        Taxonomy.load(tmp_path / "t.yaml")
    (tmp_path / "t.yaml").write_text("subtypes: [{id: 0, colour: red}]\n")
    with pytest.raises(ConfigError, match=r"name: required.*id: .*name: required.*colour: "):
        Taxonomy.load(tmp_path / "t.yaml")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Polyp", "polyp"), "'Polyp' and 'polyp' are probably one name; use one spelling"),
        (("ignore", "a"), "'ignore' cannot be the name of a subtype"),
    ],
)
def test_names_that_are_no_names_of_subtypes_are_rejected(tmp_path, names, message):
    (tmp_path / "t.yaml").write_text(str({"name": "t", "subtypes": subtypes(*names)}))
    with pytest.raises(ConfigError, match=message):
        Taxonomy.load(tmp_path / "t.yaml")
