"""Held-out patients in training: every way there, and that each one is closed."""

from dataclasses import replace
from hashlib import blake2b
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from drawn_cohort import HER2, draw_cohort, draw_region, draw_set, store
from drawn_requests import ONE, FakeGenerator, denoiser_config, first_stage_config
from safetensors.torch import save_file

from counterstain.api.sharing import import_weights
from counterstain.audit import JudgeConfig, JudgeFilterConfig
from counterstain.audit.audit import require_auditable
from counterstain.audit.judge import JudgeFilter, train_judge
from counterstain.checkpoints import load_checkpoint, read_header, save_checkpoint
from counterstain.data.cohort import CohortWriter
from counterstain.data.patches import ImageKey, Source, image_key
from counterstain.data.sampling import CopyPasteConfig, PastedPatches, SamplingConfig
from counterstain.data.split import PATIENTS_SEEN_FILE, check_no_leak, patient_key
from counterstain.errors import InputError, LeakageError
from counterstain.generators.diffusion_config import DistillationConfig
from counterstain.generators.spade_config import SpadeConfig
from counterstain.generators.style import references_of
from counterstain.generators.train import train_autoencoder, train_diffusion, train_distilled, train_spade
from counterstain.io.exports import ExportConfig, export
from counterstain.io.import_images import import_table
from counterstain.segmentation.evaluate import evaluate
from counterstain.segmentation.mixing import MixingConfig
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.segmentation.train import train_segmenter
from counterstain.sharing import export_weights
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.redraw import preview, redraw_regions
from counterstain.synthesis.synthesize import synthesize

PX = 32
TINY = {"encoder": "tu-test_resnet", "decoder_channels": (16, 16, 8, 8, 8)}
SEGMENTER = SegmenterConfig(training=ONE, mixing=MixingConfig(epoch_patches=4), encoder_weights=None, **TINY)
SPADE = SpadeConfig(training=ONE, generator_width=4, discriminator_width=4, hidden=4, latent=4, vgg_weight=0)
AUTOENCODER, DIFFUSION = first_stage_config(kind="kl"), denoiser_config()
SYNTHESIS = SynthesisConfig(sampling=SamplingConfig(background_share=0.2))
P4 = "p4"  # the test patient; p0, p1, p2 are trained on, p3 validates


class Painter(FakeGenerator):
    method = "inpainting"

    def __init__(self, header=None):
        self.header = header

    def paint(self, masks, seeds, images, redraw):
        return images


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "c", regions=1)


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    """Every kind of checkpoint, and each again as if it had seen the test patient."""
    folder, common = tmp_path_factory.mktemp("trained"), {"size_px": PX, "seed": 0}
    judge = JudgeConfig(training=ONE, **TINY)
    made = {
        "spade": train_spade(cohort, SPADE, folder / "spade", **common),
        "autoencoder": train_autoencoder(cohort, AUTOENCODER, folder / "autoencoder", **common),
        "judge": train_judge(cohort, judge, folder / "judge", **common),
        "segmenter": train_segmenter(cohort, SEGMENTER, folder / "segmenter", **common),
    }
    first = {"autoencoder": made["autoencoder"]}
    made["diffusion"] = train_diffusion(cohort, DIFFUSION, folder / "diffusion", **first, **common)
    for name in list(made):
        header, state = load_checkpoint(made[name], name)
        seen = header.model_copy(update={"patients_seen": (*header.patients_seen, P4)})
        save_checkpoint(folder / f"{name} of p4", state, seen)
        made[f"{name} of p4"] = folder / f"{name} of p4"
    return made


@pytest.fixture
def at(cohort, trained, tmp_path):
    """Where a way into training begins."""
    header = read_header(trained["spade of p4"])
    return SimpleNamespace(cohort=cohort, trained=trained, tmp=tmp_path, out=tmp_path / "out", header=header)


def segment(at, cohort=None, *, synthetic=None, **changes):
    config = SEGMENTER.model_copy(update=changes)
    mixed = {} if synthetic is None else {"synthetic": synthetic, "amount": 1.0}
    return train_segmenter(cohort or at.cohort, config, at.out, size_px=PX, seed=0, **mixed)


def encoder_file(at, name="encoder.safetensors"):
    state = load_checkpoint(at.trained["segmenter of p4"], "segmenter")[1]
    prefix = "network.encoder."
    encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    save_file(encoder, at.tmp / name)
    return str(at.tmp / name)


def listed(at, name=PATIENTS_SEEN_FILE, patient=P4):
    (at.tmp / name).write_text(f"p0\n{patient}\n")
    return str(at.tmp / name)


def read_back(at, *, alone=False):
    """An exported set whose generator saw the test patient, imported again, or its rows in another table."""
    made = draw_set(at.tmp / "drawn", at.cohort, size_px=PX, seen=(P4,))
    export(made.folder, at.tmp / "exported", ExportConfig(file_format="png"))
    table = at.tmp / "exported" / "table.csv"
    if alone:
        rows = pd.read_csv(table).assign(**{k: "exported/" + pd.read_csv(table)[k] for k in ("image", "label")})
        table = at.tmp / "mine.csv"
        rows.to_csv(table, index=False)
    taxonomy = {"taxonomy": HER2, "labels": "ids"}
    return import_table(table, mpp=0.5, out=at.tmp / "imported", **taxonomy)


def published(at, **patients):
    folder = at.trained["autoencoder of p4"]
    files = export_weights(folder, at.tmp / "weights")
    if patients.pop("elsewhere", False):
        (at.tmp / "weights" / PATIENTS_SEEN_FILE).unlink()
    return import_weights(files, kind="autoencoder", out=at.out, size_px=PX, cohort=at.cohort, **patients)


def elsewhere(at, patient):
    """Another cohort: a patient, and tissue that is drawn like the first region of the first cohort."""
    image, instances = at.cohort.read(0)
    region = replace(draw_region(np.random.default_rng(1), "r", patient), split="test")
    copy = replace(region, region="copy", image=image, instances=instances, subtypes=at.cohort.subtypes(0))
    return store(at.tmp / "elsewhere", copy if patient == "x" else region)


def redrawn(at):
    """A cohort of its training tissue, drawn by a generator that saw the test patient."""
    source = {"kind": "redrawn", "patients_seen": [P4]}
    writer = CohortWriter(at.tmp / "redrawn", HER2, 0.5, source)
    writer.add("p0", [replace(draw_region(np.random.default_rng(0), "r", "p0"), split="train")])
    return writer.finish()


def first_stage(at):
    return train_diffusion(at.cohort, DIFFUSION, at.tmp / "d", size_px=PX, seed=0, autoencoder=at.out)


def pasted(at):
    other = draw_cohort(at.tmp / "c", regions=1)
    other.regions.loc[other.regions["region"] == "p0-0", "patient"] = P4
    PastedPatches([], other, size_px=PX, config=CopyPasteConfig(), sampling=SamplingConfig(), seed=0)


def with_moved(at):
    """A set whose masks are of training patients, with an instance of the test patient."""
    source = Source(region="p4-0", slide=P4, patient=P4, y_px=0, x_px=0)
    settings = {"synthesis": {"layouts": {"share": 1.0}}}
    found = draw_set(at.out, at.cohort, size_px=PX, settings=settings, moved={1: source})
    assert P4 not in {*found.header.patients_seen, *found.patches["patient"]}
    return found


WAYS = {
    "a set whose generator saw": lambda at: segment(at, synthetic=draw_set(at.out, at.cohort, size_px=PX, seen=(P4,))),
    "a set with masks of": lambda at: segment(at, synthetic=draw_set(at.out, at.cohort, size_px=PX, part="test")),
    "a set with moved instances of": lambda at: segment(at, synthetic=with_moved(at)),
    "a generator that draws": lambda at: synthesize(
        Painter(at.header), at.cohort, at.out, SYNTHESIS, count=64, size_px=PX, seed=0
    ),
    "a judge that filters": lambda at: JudgeFilter.load(
        at.trained["judge of p4"], at.cohort, JudgeFilterConfig(), size_px=PX
    ),
    "a judge that audits": lambda at: require_auditable({}, at.cohort, at.trained["judge of p4"]),
    "the start of SPADE": lambda at: train_spade(
        at.cohort, SPADE, at.out, size_px=PX, seed=0, init=at.trained["spade of p4"]
    ),
    "the start of a first stage": lambda at: train_autoencoder(
        at.cohort, AUTOENCODER, at.out, size_px=PX, seed=0, init=at.trained["autoencoder of p4"]
    ),
    "the first stage": lambda at: train_diffusion(
        at.cohort, DIFFUSION, at.out, size_px=PX, seed=0, autoencoder=at.trained["autoencoder of p4"]
    ),
    "the start of a denoiser": lambda at: train_diffusion(
        at.cohort, DIFFUSION, at.out, size_px=PX, seed=0, autoencoder=at.trained["autoencoder"],
        init=at.trained["diffusion of p4"],
    ),
    "a teacher": lambda at: train_distilled(
        at.cohort, DistillationConfig(training=ONE), at.out, teacher=at.trained["diffusion of p4"], seed=0
    ),
    "a generator that redraws": lambda at: redraw_regions(Painter(at.header), at.cohort, at.out, SYNTHESIS, seed=0),
    "a region that is redrawn": lambda at: redraw_regions(
        Painter(), at.cohort, at.out, SYNTHESIS, seed=0, regions=["p4-0"]
    ),
    "a generator that is looked at": lambda at: preview(Painter(at.header), at.cohort, SYNTHESIS, size_px=PX, seed=0),
    "the style of a slide": lambda at: references_of(at.cohort, PX, 0).choose(P4, 1),
    "a copied instance": pasted,
    "a segmenter whose encoder is taken": lambda at: segment(at, encoder_weights=str(at.trained["segmenter of p4"])),
    "a segmenter that corrects labels": lambda at: train_segmenter(
        at.cohort, SEGMENTER, at.out, size_px=PX, seed=0, critic=at.trained["segmenter of p4"], ignore_above=1.25
    ),
    "the file of its weights": lambda at: segment(
        at, encoder_weights=str(at.trained["segmenter of p4"] / "model.safetensors")
    ),
    "a judge whose encoder is taken": lambda at: segment(at, encoder_weights=str(at.trained["judge of p4"])),
    "encoder weights with a list": lambda at: segment(
        at, encoder_weights=encoder_file(at), encoder_patients=listed(at, "mine.txt")
    ),
    "encoder weights beside a list": lambda at: segment(
        at, encoder_weights=encoder_file(at), encoder_patients=("none", listed(at))[0]
    ),
    "a redrawn cohort": lambda at: evaluate(segment(at, redrawn(at)), at.cohort, "test"),
    "an exported set": lambda at: evaluate(segment(at, read_back(at)), at.cohort, "test"),
    "its rows in another table": lambda at: evaluate(segment(at, read_back(at, alone=True)), at.cohort, "test"),
    "imported weights": lambda at: published(at, patients_seen=listed(at), elsewhere=True) and first_stage(at),
    "exported weights of which nobody is named": lambda at: published(at, patients_seen="none") and first_stage(at),
    "a segmenter of another split": lambda at: evaluate(at.trained["segmenter of p4"], at.cohort, "test"),
    "a patient spelt in another way": lambda at: evaluate(at.trained["segmenter"], elsewhere(at, "P 00"), "all"),
    "the same images under another name": lambda at: evaluate(at.trained["segmenter"], elsewhere(at, "x"), "test"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_held_out_patient_gets_into_training_or_training_tissue_into_a_test(at, way):
    with pytest.raises(LeakageError, match=r"has seen p4 of the|not of the training part|seen P 00 of|was trained on"):
        WAYS[way](at)


def test_whose_tissue_a_file_of_encoder_weights_saw_is_asked_and_remembered(at):
    file = encoder_file(at)
    with pytest.raises(InputError, match=r"whose tissue was this network trained on\? Set encoder_patients to none"):
        segment(at, encoder_weights=file)
    assert not at.out.exists()
    segment(at, encoder_weights=file, encoder_patients=listed(at, "mine.txt", patient="q"))
    assert read_header(at.out).patients_seen == ("p0", "p1", "p2", "q")


def test_training_patients_may_be_seen(cohort):
    check_no_leak(["p0", "elsewhere"], cohort, "set a")


@pytest.mark.parametrize(
    "name", ["P3", " p3", "p\u00a03", "p03", "p003", "p\u200b3", "\uff503", "p\uff13", "P 0\u00ad3 "]
)
def test_another_spelling_of_a_patient_is_the_same_patient(cohort, name):
    with pytest.raises(LeakageError, match="has seen p3 of the val split"):
        check_no_leak([name], cohort, "set a")


@pytest.mark.parametrize(
    "one_and_other", [("p1", "p10"), ("1.05", "1.5"), ("a-1", "b-1"), ("p10", "p100"), ("0", "00a")]
)
def test_other_patients_stay_others(one_and_other):
    one, other = one_and_other
    assert patient_key(one) != patient_key(other)
    assert patient_key("Jos\u00e9") == patient_key("Jose\u0301")


def test_what_is_held_out_and_the_remedy_may_be_chosen(cohort):
    with pytest.raises(LeakageError, match=r"set a has seen p3 of the val split of .*; train the generator on"):
        check_no_leak(["p0", "p3"], cohort, "set a")
    with pytest.raises(LeakageError, match=r"b has seen p0, p1, p2 and 2 more of [^ ]*; try others"):
        check_no_leak([f"p{i}" for i in range(5)], cohort, "b", splits=["all"], remedy="try others")


@pytest.mark.parametrize("height", [1, 700])
def test_the_hash_of_an_image_is_that_of_earlier_versions_in_whatever_bands_it_comes(height):
    image = np.random.default_rng(0).integers(0, 256, (height, 40, 3), dtype=np.uint8)
    key = ImageKey(height, 40)
    for top in range(0, height, 64):
        key.add(image[top : top + 64])
    known = blake2b(image.tobytes(), digest_size=8, person=f"{height}x40".encode()).hexdigest()
    assert key.value == image_key(image) == known


@pytest.mark.parametrize(("colours", "is_tissue"), [(8, False), (9, True)])
def test_images_of_eight_colours_have_no_hash_even_where_they_come_one_by_one(colours, is_tissue):
    key = ImageKey(colours, 50)
    for shade in range(colours):
        key.add(np.full((1, 50, 3), shade, np.uint8))
    assert (key.value is not None) == is_tissue
