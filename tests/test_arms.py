import pytest

from counterstain.config import build
from counterstain.errors import ConfigError
from counterstain.study.arms import read_arm
from counterstain.study.config import StudyConfig
from counterstain.study.plan import plan_study

EVERY_FORM = (
    "subtype+weighted",
    "subtype+stain",
    "subtype+mixup",
    "subtype+copypaste",
    "tumor+weighted+stain",
    "oracle+only",
    "oracle+only+filtered",
    "oracle+100+filtered",
    "oracle+100+reviewed",
    "oracle+100+pretrain",
    "oracle+50+anneal",
    "oracle+100+masked",
    "oracle+100+layouts",
    "oracle+100+hard",
    "oracle+auto+masked",
    "oracle+50+layouts+kept+filtered",
    "oracle+only+masked+relabelled",
)


def study(*extra_arms, **changes):
    settings = {"name": "s", "preset": "demo", "cohort": {"phantom": {}}, "methods": [], "repeats": 2}
    return build(StudyConfig, settings | {"extra_arms": extra_arms} | changes, "study.yaml")


def cells(*extra_arms, **changes):
    made = study(*extra_arms, **changes)
    return plan_study(made, made.resolved_recipe("study"))


def segmenter(arm, **changes):
    return next(cell for cell in cells(arm, **changes) if cell.stage == "segmenter" and cell.arm == arm)


def test_every_form_of_a_name_is_an_arm_of_a_study():
    assert [arm.name for arm in study(*EVERY_FORM).arms] == ["tumor", "subtype", *EVERY_FORM]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gan+100", "'gan' is not known; possible are tumor or subtype, METHOD\\+AMOUNT"),
        ("oracle", "an amount is missing; possible are"),
        ("oracle+lots", "'lots' is no amount, nor 'auto' or 'only'"),
        ("oracle+0", "must be above 0"),
        (
            "subtype+wheighted",
            "'wheighted' is not known; did you mean .weighted.; possible are .*weighted, \\+stain",
        ),
        ("subtype+filtered", "\\+filtered is for synthetic patches"),
        ("oracle+only+anneal", "\\+anneal needs real patches"),
        ("oracle+100+pretrain+anneal", "exclude each other"),
        ("oracle+100+mixup+masked", "\\+mixup and \\+masked exclude each other"),
        ("oracle+100+kept", "\\+kept needs \\+layouts"),
        ("subtype+relabelled", "\\+relabelled is for synthetic patches"),
        ("oracle+auto+reviewed", "\\+reviewed needs an amount"),
        ("subtype+stain+weighted", "write it as subtype\\+weighted\\+stain"),
        ("oracle+050", "write it as oracle\\+50"),
    ],
)
def test_a_wrong_name_gets_one_line_that_lists_the_forms(name, message):
    with pytest.raises(ConfigError, match=rf"^study.yaml: extra_arms: arm [^\n]*{message}[^\n]*$"):
        study(name)


def test_an_arm_twice_and_an_oracle_on_real_tissue_are_refused():
    with pytest.raises(ConfigError, match=r"extra_arms: oracle\+100 is an arm already"):
        study("oracle+100", methods=["oracle"], amounts=[1.0])
    with pytest.raises(ConfigError, match="oracle draws phantoms only"):
        study("oracle+only", cohort={"path": "somewhere"})


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("subtype", "subtype-sampled"),
        ("tumor+weighted+stain", "tumor-sampled, weighted loss, stain jitter"),
        ("diffusion+12.5", "diffusion +12.5 %"),
        ("diffusion+only+filtered", "diffusion only, filtered"),
        ("spade+100+pretrain", "spade +100 %, pre-training"),
        ("real", "real"),
    ],
)
def test_reports_say_an_arm_in_words(name, label):
    assert read_arm(name).label.replace("\N{NO-BREAK SPACE}", " ") == label


def test_variants_change_the_settings_that_they_name_and_no_others():
    plain = segmenter("subtype+weighted").settings["config"] | {"subtype_weighting": 0.0}
    assert segmenter("subtype+weighted").settings["config"]["subtype_weighting"] == 1.0
    stain = segmenter("subtype+stain").settings["config"]
    assert (stain["sampling"]["stain_jitter"], stain["sampling"]["stains"]) == (0.1, "dab")
    assert segmenter("subtype+copypaste").settings["config"]["copy_paste"]["target"] == "inverse"
    assert segmenter("subtype+mixup").settings["config"] == plain | {"mixup_alpha": 0.4}
    pretrained = segmenter("oracle+100+pretrain", variants={"pretrain": 0.7}).settings["config"]["mixing"]
    assert (pretrained["schedule"], pretrained["pretrain_share"]) == ("pretrain", 0.7)
    only = segmenter("oracle+only").settings  # as many patches as the dataset has, and no real ones
    assert (only["amount"], only["share"]) == (1.0, 1.0)


def test_all_arms_of_a_repeat_share_steps_batch_and_seed():
    settings = [c.settings for c in cells(*EVERY_FORM) if c.stage == "segmenter" and c.repeat == 0]
    shared = {(s["seed"], *s["config"]["training"].items(), s["config"]["mixing"]["steps"]) for s in settings}
    assert len(settings) == 2 + len(EVERY_FORM)
    assert len(shared) == 1


def test_a_filtered_set_needs_a_judge_and_is_as_long_as_the_other():
    planned = cells("oracle+200", "oracle+200+filtered", "oracle+only+filtered")
    sets = {cell.name: cell for cell in planned if cell.stage == "synthetic"}
    (judge,) = [cell for cell in planned if cell.stage == "judge"]
    assert list(sets) == ["synthetic oracle", "synthetic oracle+filtered"]
    assert sets["synthetic oracle"].details == sets["synthetic oracle+filtered"].details == {"count": 640}
    assert sets["synthetic oracle+filtered"].inputs["judge"] == judge.folder
    assert "judge" not in sets["synthetic oracle"].inputs


def test_new_layouts_are_a_set_of_their_own_that_shares_the_generator():
    planned = cells("diffusion+100", "diffusion+100+layouts", "diffusion+100+layouts+kept")
    sets = [cell for cell in planned if cell.stage == "synthetic"]
    assert [cell.set_name for cell in sets] == ["diffusion", "diffusion+layouts", "diffusion+layouts+kept"]
    assert len({cell.inputs["generator"] for cell in sets}) == 1
    assert [cell.settings["config"].get("layouts", {}).get("relabel") for cell in sets] == [None, True, False]


def test_a_masked_arm_asks_the_baseline_of_the_same_repeat():
    planned = {cell.name: cell for cell in cells("oracle+100+masked") if cell.stage == "segmenter"}
    for repeat in (0, 1):
        masked = planned[f"segmenter oracle+100+masked #{repeat}"]
        assert masked.inputs["critic"] == planned[f"segmenter subtype #{repeat}"].folder
        assert masked.settings["ignore_above"] == 1.25


@pytest.mark.parametrize(
    ("variants", "renamed"),
    [
        ({"weighted": 0.5}, {"subtype+weighted", "tumor+weighted+stain"}),
        (
            {"filtered": {"agreement": 0.5}},
            {"oracle+only+filtered", "oracle+100+filtered", "oracle+50+layouts+kept+filtered"},
        ),
        ({"layouts": {"share": 0.25}}, {"oracle+100+layouts", "oracle+50+layouts+kept+filtered"}),
        ({"pretrain": 0.25}, {"oracle+100+pretrain"}),
        ({"masked": 2.0}, {"oracle+100+masked", "oracle+auto+masked", "oracle+only+masked+relabelled"}),
        ({"cross_fit": 2}, {"oracle+100+hard", "oracle+auto+masked"}),
        ({"relabelled": 2.0}, {"oracle+only+masked+relabelled"}),
    ],
)
def test_how_strong_a_variant_is_concerns_its_arms_alone(variants, renamed):
    before = {cell.folder for cell in cells(*EVERY_FORM)}
    after = [cell for cell in cells(*EVERY_FORM, variants=variants) if cell.stage == "segmenter" and cell.arm]
    assert {cell.arm for cell in after if cell.folder not in before} == renamed
