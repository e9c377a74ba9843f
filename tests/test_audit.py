from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import timm
import torch
from drawn_cohort import draw_cohort
from drawn_requests import FakeGenerator
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch.nn import SiLU
from typer.testing import CliRunner

import counterstain
from counterstain.audit import JudgeConfig
from counterstain.audit.audit import audit_sets, require_auditable, sheet, training_halves
from counterstain.audit.copies import CopiesFound, CopySearch, copy_table
from counterstain.audit.fidelity import coverage, features_of, frechet_distance, kernel_distance, nearest
from counterstain.audit.findings import HALVES, HELD_OUT, AuditConfig, seam, stain_density, stain_table
from counterstain.audit.judge import instance_loss, instance_probabilities, load_judge, train_judge
from counterstain.checkpoints import load_checkpoint, read_header, save_checkpoint, write_header
from counterstain.cli import app
from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import Patch, Source
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.data.stains import STAIN_VECTORS
from counterstain.errors import ConfigError, InputError, LeakageError, MismatchError
from counterstain.generators.diffusion_config import CounterstainConfig
from counterstain.synthesis.masks import LayoutsConfig, SynthesisConfig
from counterstain.synthesis.synthesize import synthesize
from counterstain.training_config import TrainingConfig

CONFIG = AuditConfig(patches=60, min_area_px=20, copies=20)
SMALL = JudgeConfig(
    training=TrainingConfig(steps=130, batch_size=16),
    sampling=SamplingConfig(background_share=0.2),  # discs are told apart by their grey level: no jitter of the stain
    encoder="tu-resnet10t",
    decoder_channels=(32, 32, 16, 16, 8),
    lr=4e-3,
    warmup_steps=5,
    ema_decay=0.9,
)


class Painter(FakeGenerator):
    """Draws discs as the cohort has them; a deaf one does not listen to the labels."""

    method = "spade"

    def __init__(self, *, deaf: bool = False) -> None:
        self.deaf = deaf

    def paint(self, label_masks, seeds, images, redraw):
        labels = np.where(label_masks > 0, 5, 0) if self.deaf else label_masks.astype(int)
        shade = np.array([230, 170, 140, 110, 80, 50])[labels][..., None]
        noise = [np.random.default_rng(s).integers(-15, 16, (*label_masks.shape[1:], 3)) for s in seeds]
        return np.clip(shade + np.stack(noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "c")


@pytest.fixture(scope="module")
def judge(cohort, tmp_path_factory):
    return train_judge(cohort, SMALL, tmp_path_factory.mktemp("judge") / "j", size_px=32, seed=0)


@pytest.fixture(scope="module")
def sets(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    config = SynthesisConfig(sampling=SamplingConfig(background_share=0.2))
    painters = {"listens": Painter(), "deaf": Painter(deaf=True)}
    for name, painter in painters.items():
        synthesize(painter, cohort, folder / name, config, count=60, size_px=32, seed=0)
    return {name: PatchSet.open(folder / name) for name in painters}


@pytest.fixture(scope="module")
def audit(sets, cohort, judge):
    return audit_sets(sets, cohort, judge, CONFIG)


def normal(seed, n=400, d=6, shift=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def test_the_frechet_distance_of_normal_samples_is_the_known_one():
    a, b = normal(0, 200_000, 2), normal(1, 200_000, 2, shift=1.0, scale=2.0)
    assert frechet_distance(a, b) == pytest.approx(2 * 1.0 + 2 * (1 + 4 - 2 * 2), rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_the_frechet_distance_is_the_same_in_both_spaces():
    a, b = normal(0, 40, 50), normal(1, 40, 50, shift=0.3)
    wide = frechet_distance(np.hstack([a, a * 0]), np.hstack([b, b * 0]))
    assert frechet_distance(a, b) == pytest.approx(wide)
    tall, other = normal(2, 60, 5), normal(3, 70, 5, scale=2)
    root = scipy.linalg.sqrtm(np.cov(tall, rowvar=False) @ np.cov(other, rowvar=False)).real
    covariances = np.trace(np.cov(tall, rowvar=False) + np.cov(other, rowvar=False) - 2 * root)
    assert frechet_distance(tall, other) == pytest.approx(((tall.mean(0) - other.mean(0)) ** 2).sum() + covariances)


def test_the_kernel_distance_equals_the_sums_written_out():
    a, b = normal(0, 5, 3), normal(1, 4, 3)

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    among_a = np.mean([k(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
    among_b = np.mean([k(b[i], b[j]) for i in range(4) for j in range(4) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(among_a + among_b - 2 * between)


def test_coverage_equals_neighbourhoods_counted_one_by_one():
    real, drawn, k = normal(0, 30, 2), normal(1, 25, 2, shift=0.5), 3

    def reach(x):
        return [sorted(np.linalg.norm(p - q) for q in x)[k] for p in x]

    near = [[np.linalg.norm(r - d) for d in drawn] for r in real]
    reach_real, reach_drawn = reach(real), reach(drawn)
    inside = np.array([[near[i][j] <= reach_real[i] for j in range(25)] for i in range(30)])
    found = coverage(real, drawn, k)
    assert found.precision == inside.any(0).mean()
    assert found.coverage == inside.any(1).mean()
    assert found.density == pytest.approx(inside.sum() / (k * 25))
    backwards = np.array([[near[i][j] <= reach_drawn[j] for j in range(25)] for i in range(30)])
    assert found.recall == backwards.any(1).mean()


def test_too_few_images_are_told_how_many_are_needed():
    with pytest.raises(InputError, match="more than 5 of each kind"):
        coverage(normal(0, 5, 2), normal(1, 50, 2))
    with pytest.raises(InputError, match="at least two"):
        frechet_distance(normal(0, 1, 2), normal(1, 50, 2))


def test_the_nearest_real_image_is_found():
    found = nearest(np.array([[0.0, 0.0], [5.0, 5.0]]), np.array([[5.0, 4.0], [0.0, 3.0]]))
    assert found.to_numpy().tolist() == [[1, 0, 1.0], [0, 1, 3.0]]


def one_disc(inside, outside, subtype=4):
    y, x = np.mgrid[:32, :32]
    instances = (((y - 16) ** 2 + (x - 16) ** 2) < 64).astype(np.int32)
    colours = np.array([np.broadcast_to(outside, 3), np.broadcast_to(inside, 3)], np.uint8)
    image = colours[instances]
    source = Source(region="r", slide="s", patient="p", y_px=0, x_px=0)
    return Patch(image=image, instances=instances, subtypes={1: subtype}, source=source)


@pytest.mark.parametrize(("haematoxylin", "dab"), [(0.2, 0.9), (0.7, 0.0), (0.0, 0.3)])
def test_stain_is_told_from_haematoxylin(haematoxylin, dab):
    vectors = {name: np.array(v) / np.linalg.norm(v) for name, v in STAIN_VECTORS.items()}
    density = haematoxylin * vectors["haematoxylin"] + dab * vectors["dab"]
    pixel = np.round(256 * np.exp(-density) - 1)
    found = stain_density(np.broadcast_to(pixel, (2, 2, 3)).astype(np.uint8), "dab")
    assert found == pytest.approx(np.full((2, 2), dab), abs=0.03)


def test_stain_is_measured_inside_instances_that_were_drawn_and_are_large_enough():
    patch = one_disc((120, 70, 40), (255, 255, 255))
    table = stain_table([patch], "dab", min_area_px=20)
    assert table["subtype"].tolist() == [4]
    assert table["density"].item() > 0.5
    assert stain_table([patch], "dab", min_area_px=500).empty
    assert stain_table([patch], "dab", 20, kept={4, 255}).empty


def test_a_seam_is_the_step_across_the_border_of_what_was_drawn():
    assert seam(one_disc(100, 130)) == 30
    assert np.isnan(seam(one_disc(100, 130), kept={4, 255}))


def test_a_generator_that_listens_adheres_as_well_as_real_tissue(audit, sets):
    _, real, listens, deaf = audit.findings
    assert real.adherence.mean() > 0.9
    assert listens.adherence.mean() > 0.9
    assert deaf.adherence.drop("LCIS/DCIS").max() < 0.2
    assert deaf.adherence["LCIS/DCIS"] > 0.9
    assert listens.confusion.to_numpy().sum() == (sets["listens"].instances["area_px"] >= 20).sum()


def test_an_audit_says_in_words_what_its_figures_mean(audit):
    halves, held_out, *sets = audit.findings
    listens, deaf = (replace(found, copies=CopiesFound()) for found in sets)  # discs are alike
    listens = replace(listens, confusion=held_out.confusion)  # however well this judge has learnt
    judge, listens, deaf = replace(audit, findings=(halves, held_out, listens, deaf)).in_words()
    assert judge.startswith("The judge, on held-out real tissue, takes these shares")
    assert "guessing would be right for 0.20" in judge
    assert "look as asked about as often as in real tissue" in listens
    assert listens.endswith("nothing speaks against it.")
    assert re.search(r"fewer instances than in real tissue look as asked \(HER2 0 0.\d\d against", deaf)
    assert "more than patients do from each other" in deaf
    assert deaf.endswith("look into this before you use it.")
    copied = replace(sets[0], copies=CopiesFound(share=0.4))
    assert (
        "40% resemble training tissue more closely than 99 %"
        in replace(audit, findings=(halves, held_out, copied)).in_words()[1]
    )


def test_a_judge_that_does_not_know_real_tissue_is_said_to_be_worth_nothing(audit):
    halves, held_out, *sets = audit.findings
    confusion = held_out.confusion * 0 + 3  # it guesses
    confusion.loc["HER2 0"] = 0
    weak = replace(audit, findings=(halves, replace(held_out, confusion=confusion), *sets))
    said = " ".join(weak.in_words())
    assert "It does not know HER2 1+, HER2 2+, HER2 3+, LCIS/DCIS: what it says of these in a set means nothing" in said
    assert "No held-out instance of HER2 0 was judged" in said
    assert "Train it on more patients or for more steps" in said
    assert "nothing speaks against it" not in said


def test_what_looks_like_real_tissue_is_nearer_to_it(audit):
    halves, real, listens, deaf = audit.findings
    assert deaf.frechet.low > listens.frechet.high
    assert deaf.kernel.low > listens.kernel.high
    assert listens.coverage > deaf.coverage
    assert halves.frechet.value < 0.2 * deaf.frechet.value
    assert np.isnan(halves.copies.share)
    assert real.copies.share <= 0.06
    assert listens.copies.share <= 0.1


@pytest.mark.parametrize("counterstain", [None, CounterstainConfig()])
def test_images_that_keep_their_nuclei_are_not_compared_with_their_own_patch(cohort, judge, tmp_path, counterstain):
    class Copier(Painter):
        def paint(self, label_masks, seeds, images, redraw):
            return images

    copier = Copier()
    copier.settings = {"counterstain": counterstain.model_dump()} if counterstain else {}
    config = SynthesisConfig(sampling=SamplingConfig(background_share=0.2))
    synthesize(copier, cohort, tmp_path / "s", config, count=60, size_px=32, seed=0)
    found = audit_sets({"s": PatchSet.open(tmp_path / "s")}, cohort, judge, CONFIG).findings[2].copies
    copied = (found.table["similarity"] > 0.999).mean()
    assert copied == 0 if counterstain else copied > 0.4  # the others show little but noise


def test_instances_that_a_new_layout_keeps_are_not_audited(cohort, judge, tmp_path):
    config = SynthesisConfig(layouts=LayoutsConfig(relabel=False))
    found = synthesize(Painter(), cohort, tmp_path / "s", config, count=60, size_px=32, seed=0)
    areas = found.instances.merge(found.moved[["index", "instance"]])["area_px"]
    findings = audit_sets({"s": found}, cohort, judge, CONFIG).findings[2]
    assert findings.confusion.to_numpy().sum() == (areas >= CONFIG.min_area_px).sum() > 0


def test_moved_instances_that_keep_their_nuclei_are_not_compared_with_the_tissue_they_are_from(cohort, tmp_path):
    class Copier(Painter):
        def paint(self, label_masks, seeds, images, redraw):
            return images

    found = synthesize(
        Copier(), cohort, tmp_path / "s", SynthesisConfig(layouts=LayoutsConfig()), count=60, size_px=32, seed=0
    )
    moved = found.moved.groupby("index")["instance"].agg(set)
    patches = [
        replace(found[i], subtypes={n: s if n in ids else 255 for n, s in found[i].subtypes.items()})
        for i, ids in moved.items()
    ]
    origins = [found.origins([i])[i] for i in moved.index]
    assert [len(places) for places in origins] == [1 + len(ids) for ids in moved]
    search, kept = CopySearch(cohort, 32), frozenset({255})
    own, apart = (copy_table(search, patches, kept, shown=s) for s in ({}, dict(enumerate(origins))))
    assert own["similarity"].max() > 0.999  # few of the flat discs are found again
    assert apart["similarity"].max() < 0.9


def test_a_judge_is_trained_once_and_remembers_whom_it_saw(cohort, judge):
    before = (judge / "model.safetensors").stat().st_mtime_ns
    assert train_judge(cohort, SMALL, judge, size_px=32, seed=0) == judge
    assert (judge / "model.safetensors").stat().st_mtime_ns == before
    assert load_judge(judge)[1].patients_seen == ("p0", "p1", "p2")


def test_the_loss_of_instances_is_that_of_their_mean_logits():
    logits = torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    instances = torch.zeros(2, 16, 16, dtype=torch.int32)
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    for patch, rows, instance, subtype in [(0, slice(8), 3, 2), (1, slice(8), 3, 5), (1, slice(8, 12), 7, 255)]:
        instances[patch, rows], labels[patch, rows] = instance, subtype
    instances[0, 15, :3], labels[0, 15, :3] = 2, 4  # too small
    means = logits[:, 1:, :8].mean((2, 3))
    expected = torch.nn.functional.cross_entropy(means, torch.tensor([1, 4]))
    assert instance_loss(logits, labels, instances).item() == pytest.approx(expected.item())
    assert instance_loss(logits, labels, torch.zeros_like(instances)).item() == 0


def test_the_judge_learns_real_subtypes_and_leaves_out_what_is_to_be_ignored(cohort, judge):
    sampler, loaded = PatchSampler(cohort, "test", 32, SamplingConfig(), 0), load_judge(judge)[0]
    discs = [one_disc(80, 230, subtype=255), one_disc(80, 230, subtype=5)]
    assert instance_probabilities(loaded, discs)["asked"].tolist() == [5]
    opinions = instance_probabilities(loaded, [sampler[i] for i in range(40)], min_area_px=20)
    assert (opinions["asked"] == opinions["seen"]).mean() > 0.9
    assert opinions["tissue"].mean() > 0.8
    probabilities = opinions.filter(like="probability_").to_numpy()
    assert probabilities.sum(1) == pytest.approx(1)
    assert (probabilities.argmax(1) + 1 == opinions["seen"]).all()


def test_the_command_writes_tables_and_pictures(sets, cohort, judge, tmp_path):
    arguments = [str(s.folder) for s in sets.values()]
    options = {"cohort": cohort.folder, "judge": judge, "out": tmp_path / "a", "copies": 10}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["audit", *arguments, *words, "--patches", "60"])
    assert result.exit_code == 0, result.output
    assert "adherence" in result.output
    assert set(pd.read_csv(tmp_path / "a" / "audit.csv")["images"]) == {HALVES, HELD_OUT, "listens", "deaf"}
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert {"confusion.csv", "nearest.csv", "copies.csv", "audit.json"} <= files
    assert {"deaf-copies.png", "deaf-nearest.png", "listens-examples.png"} <= files
    with pytest.raises(MismatchError, match=r"belongs to another run \(audit: sets\.deaf"):
        counterstain.audit(arguments[:1], **options | {"patches": 60})


def test_a_sheet_shows_each_pixel_as_a_square_and_cuts_captions_off_at_their_column():
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 200, (3, 32, 32, 3), dtype=np.uint8)
    plain = np.asarray(sheet({"a": patches[:2], "b": patches[2:]}))
    assert np.array_equal(plain[:, -264:-4][4:132:4, :128:4], patches[0])
    assert np.array_equal(plain[4:132, -132:-4], patches[1].repeat(4, 0).repeat(4, 1))
    captioned = np.asarray(sheet({"a": patches[:2]}, ["a name much too long for a column of 128 px", ""]))
    assert (captioned[:20, -132:] == 255).all()
    assert (captioned[:20, :-136] < 100).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patients_seen": ("p0", "p4")}, LeakageError, "has seen p4 of the test split"),
        ({"cohort": "another"}, MismatchError, r"the judge .*: was made from another cohort than"),
        ({"mpp": 1.0}, MismatchError, r"is at 1 um/px, .* at 0\.5"),
        ({"size_px": 64}, MismatchError, r"listens: has patches of 32 px, the judge .* learnt from 64 px"),
    ],
)
def test_a_judge_that_does_not_fit_is_refused(sets, cohort, judge, tmp_path, change, error, message):
    shutil.copytree(judge, tmp_path / "j")
    write_header(tmp_path / "j", read_header(judge).model_copy(update=change))
    with pytest.raises(error, match=message):
        audit_sets(sets, cohort, tmp_path / "j", CONFIG)


def test_a_set_of_another_cohort_is_refused(cohort, judge, tmp_path):
    other = draw_cohort(tmp_path / "c", regions=1)
    synthesize(Painter(), other, tmp_path / "s", SynthesisConfig(), count=64, size_px=32, seed=0)
    with pytest.raises(MismatchError, match=r"^s: was made from another cohort than"):
        require_auditable({"s": PatchSet.open(tmp_path / "s")}, cohort, judge)


@pytest.mark.parametrize("settings", [{}, {"synthesis": None}, {"synthesis": {"relabel": {"keep": 3}}}])
def test_a_set_that_does_not_say_what_it_kept_is_refused(sets, cohort, judge, settings):
    given = PatchSet(sets["deaf"].folder, sets["deaf"].header.model_copy(update={"settings": settings}))
    with pytest.raises(InputError, match="does not say which subtypes relabelling kept"):
        require_auditable({"s": given}, cohort, judge)


def test_weights_that_are_missing_leave_no_folder_behind(sets, cohort, judge, tmp_path):
    arguments = [str(sets["deaf"].folder), "--cohort", cohort.folder, "--judge", judge, "--out", tmp_path / "a"]
    result = CliRunner().invoke(app, ["audit", *map(str, arguments), "--features", "timm:resnet10t"])
    assert isinstance(result.exception, ConfigError)
    assert "give the file of its weights" in str(result.exception)
    assert not (tmp_path / "a").exists()


def test_features_come_from_a_local_file_of_timm_weights(judge, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    features = features_of("timm:test_resnet", tmp_path / "w.pt", load_judge(judge)[0], 2)
    patches = [one_disc(80, 230), one_disc(200, 230), one_disc(80, 230)]
    found = features(patches)
    assert found.shape == (3, network.num_features)
    assert found[0] == pytest.approx(found[2], rel=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_features_come_from_a_foundation_model_that_timm_saved(judge, tmp_path):
    torch.manual_seed(0)
    options = {"num_classes": 0, "init_values": 1e-5, "global_pool": "", "mlp_layer": SwiGLUPacked, "act_layer": SiLU}
    network = timm.create_model("test_vit", pretrained=False, **options).eval()
    kept = {name: options[name] for name in ("init_values", "global_pool")}  # JSON holds no classes
    known = {"input_size": [3, 160, 160], "fixed_input_size": True, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "test_vit", "num_classes": 0, "model_args": kept, "pretrained_cfg": known}
    (tmp_path / "Virchow2").mkdir()
    (tmp_path / "Virchow2" / "config.json").write_text(json.dumps(config))
    torch.save(network.state_dict(), tmp_path / "Virchow2" / "pytorch_model.bin")
    features = features_of(f"timm:{tmp_path / 'Virchow2'}", None, load_judge(judge)[0], 2)
    found = features([one_disc(80, 230), one_disc(200, 230)])
    assert found.shape == (2, 2 * network.num_features)
    with torch.no_grad():
        pixels = torch.from_numpy(one_disc(80, 230).image).movedim(-1, 0)[None].float() / 255
        large = torch.nn.functional.interpolate(pixels, (160, 160), mode="bicubic", antialias=True).clamp(0, 1)
        tokens = network((large - 0.5) / 0.5)[0]
    expected = torch.cat([tokens[0], tokens[1:].mean(0)])
    assert found[0] == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("timm:test_resnet", {"stem.weight": 1}, "does not fit test_resnet"),
        ("timm:nothing_like_it", {}, "timm has no network of this name"),
        ("resnet", {}, "expected judge or timm:NAME"),
        ("judge", {}, "need no file"),
    ],
)
def test_features_that_cannot_be_had_are_refused(judge, tmp_path, name, content, message):
    save_file({key: torch.zeros(value) for key, value in content.items()}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message):
        features_of(name, tmp_path / "w.safetensors", load_judge(judge)[0], 2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["train", "train", "test", "test", "test"], "no region in split 'val'"),
        (["train", "val", "val", "test", "test"], "cannot be halved by patient; it needs two patients at least"),
        ([None] * 5, "no region in split 'train'"),
    ],
)
def test_a_cohort_with_too_few_patients_for_an_audit_says_which(sets, judge, tmp_path, parts, message):
    bare = draw_cohort(tmp_path / "c", regions=1)
    split = {f"p{i}": part for i, part in enumerate(parts) if part}
    other = bare.write_split(split) if split else bare
    other.regions["split"] = parts
    header, state = load_checkpoint(judge, "judge")
    save_checkpoint(tmp_path / "j", state, header.model_copy(update={"cohort": other.fingerprint, "patients_seen": ()}))
    with pytest.raises(InputError, match=message):
        audit_sets({}, other, tmp_path / "j", CONFIG)


def test_halves_of_the_training_part_share_no_patient(cohort):
    halves = training_halves(cohort, 32, 20, 0)
    patients = [{patch.source.patient for patch in half} for half in halves]
    assert [len(half) for half in halves] == [20, 20]
    assert patients[0] | patients[1] == set(cohort.patients("train"))
    assert not patients[0] & patients[1]
