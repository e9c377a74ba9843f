import shutil

import numpy as np
import pandas as pd
import pytest
import timm
import timm.models
import torch
from drawn_cohort import HER2
from safetensors.torch import save_file
from torch.nn import functional
from typer.testing import CliRunner

import counterstain as cs
from counterstain.checkpoints import CheckpointHeader, load_checkpoint, read_header, save_checkpoint
from counterstain.cli import app
from counterstain.config import build
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.patch_set import PatchSet, PatchSetHeader, PatchSetWriter, SyntheticPatch
from counterstain.data.patches import Patch, Source
from counterstain.data.region_store import Region
from counterstain.data.sampling import CopyPasteConfig, PatchSampler
from counterstain.errors import ConfigError, InputError, LeakageError, MismatchError
from counterstain.segmentation import corrections
from counterstain.segmentation import train as training_module
from counterstain.segmentation.corrections import Critic, border_labels
from counterstain.segmentation.counts import by_slide, measures, pooled
from counterstain.segmentation.evaluate import evaluate
from counterstain.segmentation.inference import Canvas, filled, sliding_window_inference
from counterstain.segmentation.mixing import MixingConfig
from counterstain.segmentation.model import (
    Segmenter,
    cross_entropy_loss,
    dice_loss,
    load_encoder_weights,
    load_segmenter,
)
from counterstain.segmentation.segmenter_config import InferenceConfig, SegmenterConfig, Windows
from counterstain.segmentation.train import train_segmenter
from counterstain.taxonomy import IGNORE, Subtype, Taxonomy
from counterstain.training_config import TrainingConfig

PX = 32
TWO = Taxonomy(
    name="two",
    subtypes=(Subtype(id=1, name="pale", colour="#cccccc"), Subtype(id=2, name="dark", colour="#333333")),
)
OTHER = TWO.model_copy(update={"subtypes": (TWO.subtypes[0], Subtype(id=2, name="odd", colour="#333333"))})
SPLIT = {"a": "train", "b": "train", "c": "val", "d": "test"}


def config(steps: int = 2, **changes: object) -> SegmenterConfig:
    tiny = SegmenterConfig(
        training=TrainingConfig(
            steps=steps, batch_size=2, precision="32", accelerator="cpu", checkpoint_every_steps=2, log_every_steps=1
        ),
        mixing=MixingConfig(epoch_patches=4),
        encoder="tu-test_resnet",  # timm's smallest
        encoder_weights=None,
        decoder_channels=(16, 16, 8, 8, 8),
        lr=3e-3,
    )
    return tiny.model_copy(update=changes)


def draw(rng: np.random.Generator, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Two dark discs on a bright ground."""
    y, x = np.mgrid[:size_px, :size_px]
    instances = np.zeros((size_px, size_px), np.int32)
    for instance, cx in ((1, size_px // 4), (2, 3 * size_px // 4)):
        instances[(y - rng.integers(8, size_px - 8)) ** 2 + (x - cx) ** 2 < (size_px // 5) ** 2] = instance
    image = np.where(instances[..., None] > 0, 60, 200) + rng.integers(-20, 20, (size_px, size_px, 3))
    return image.astype(np.uint8), instances


def make_cohort(
    folder, taxonomy: Taxonomy = TWO, mpp: float = 1.0, split: dict[str, str] = SPLIT, seed: int = 0
) -> Cohort:
    writer = CohortWriter(folder, taxonomy=taxonomy, mpp=mpp, source={"kind": "test"})
    rng = np.random.default_rng(seed)
    for patient, part in split.items():
        regions = []
        for i in range(2):
            image, instances = draw(rng, 48)
            regions.append(
                Region(
                    region=f"{patient}{i}", slide=f"slide {patient}", patient=patient, split=part,
                    image=image, instances=instances, subtypes={1: 1, 2: 2},
                )
            )  # fmt: skip
        writer.add(patient, regions)
    return writer.finish()


def make_set(folder, count: int = 4, patient: str = "a", seen: tuple[str, ...] = ("a", "b"), **changes) -> PatchSet:
    known = {"method": "oracle", "taxonomy": TWO, "size_px": PX, "mpp": 1.0, "seed": 0, "cohort": "", "generator": ""}
    header = PatchSetHeader(**(known | changes), count=count, patients_seen=seen, settings={}, version="0")
    rng, patches = np.random.default_rng(1), []
    source = Source(region=f"{patient}0", slide=f"slide {patient}", patient=patient, y_px=0, x_px=0)
    writer = PatchSetWriter(folder, header)
    for index in writer.indices(0):
        image, instances = draw(rng, header.size_px)
        patch = Patch(image=image, instances=instances, subtypes={1: 2, 2: 1}, source=source)
        patches.append(SyntheticPatch(index=index, patch=patch, subtypes_before={1: 1, 2: 2}, seed=index))
    writer.write(0, patches)
    return writer.finish()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("cohort") / "cohort")


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    """A segmenter that has learnt that dark is tumour."""
    out = tmp_path_factory.mktemp("trained") / "segmenter"
    return train_segmenter(cohort, config(steps=30), out, size_px=PX, seed=0)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder, "segmenter")[1]


def assert_equal_weights(one, other) -> None:
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


# Losses


def test_losses_of_perfect_and_of_wrong_predictions() -> None:
    labels = torch.tensor([[[0, 2], [1, 0]]], dtype=torch.uint8)
    right = functional.one_hot((labels > 0).long(), 2).movedim(-1, 1) * 40.0
    assert dice_loss(right, labels).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(-right, labels).item() == pytest.approx(1 - 1 / 5)
    assert cross_entropy_loss(right, labels).item() == pytest.approx(0, abs=1e-6)
    assert cross_entropy_loss(-right, labels).item() == pytest.approx(40)


def test_dice_is_taken_over_the_whole_batch() -> None:
    labels = torch.zeros((2, 8, 8), dtype=torch.uint8)
    labels[0, :4] = 1
    logits = torch.randn((2, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    side_by_side = dice_loss(torch.cat([*logits], dim=2)[None], torch.cat([*labels], dim=1)[None])
    assert dice_loss(logits, labels).item() == pytest.approx(side_by_side.item(), abs=1e-6)


def test_ignored_pixels_cost_nothing() -> None:
    labels = torch.full((1, 4, 4), IGNORE, dtype=torch.uint8)
    labels[:, :2] = 1
    logits = torch.randn((1, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    for loss in (dice_loss, cross_entropy_loss):
        assert loss(logits, labels).item() == pytest.approx(loss(logits[:, :, :2], labels[:, :2]).item(), abs=1e-6)
    assert cross_entropy_loss(logits, torch.full_like(labels, IGNORE)).item() == 0


# Network


@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize("architecture", ["unetplusplus", "fpn", "linknet", "deeplabv3plus", "manet"])
def test_every_architecture_draws_one_logit_per_pixel(architecture, depth) -> None:
    segmenter = Segmenter(config(architecture=architecture, encoder_depth=depth, decoder_channels=None)).eval()
    assert segmenter.tumour_logits(torch.zeros((1, 64, 64, 3), dtype=torch.uint8)).shape == (1, 64, 64)


def test_stages_below_the_encoder_s_depth_are_left_out() -> None:
    shallow, deep = (Segmenter(config(encoder_depth=depth, decoder_channels=(8,) * depth)) for depth in (3, 5))
    assert len(shallow.state_dict()) < len(deep.state_dict())
    shallow(torch.zeros((2, 32, 32, 3), dtype=torch.uint8)).sum().backward()
    assert all(weight.grad is not None for weight in shallow.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet18", "encoder_depth": 4, "decoder_channels": None},
         r"encoder_depth 4: resnet18 would keep its deeper stages.*tu-resnet18"),
        ({"encoder": "resnet43"}, r"encoder 'resnet43': unknown; did you mean .*resnet34"),
        ({"encoder": "tu-resnet43"}, r"encoder 'tu-resnet43': unknown; did you mean tu-resnet34"),
        ({"encoder": "tu-resnet18.nobody"}, r"makes no unet \(Invalid pretrained tag .*; try resnet34"),
        ({"encoder": "tu-vit_base_patch16_224"}, r"makes no unet \(Unsupported model"),
        ({"encoder": "tu-hf-hub:anybody/anything"}, "encoder: .*expected the name of a network"),
        ({"encoder": "tu-local-dir:/tmp"}, "encoder: .*expected the name of a network"),
        ({"architecture": "fpn"}, "decoder_channels: fpn has a fixed number"),
        ({"encoder_depth": 4}, "5 numbers for an encoder_depth of 4; give 4"),
        ({"dice_weight": 0.0, "cross_entropy_weight": 0.0}, "are both 0: nothing would be learnt"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_is_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Segmenter(build(SegmenterConfig, config(**changes).model_dump()))


# Encoder weights


@pytest.mark.parametrize("encoder", ["resnet18", "tu-test_resnet"])
def test_imagenet_weights_that_cannot_be_downloaded_are_an_error_after_one_try(monkeypatch, encoder) -> None:
    tried = []

    def no_connection(request, **_):
        tried.append(request.full_url)
        raise OSError("no connection")

    monkeypatch.setattr("urllib.request.urlopen", no_connection)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    settings = config(encoder=encoder, encoder_weights="imagenet")
    with pytest.raises(InputError, match=r"cannot be downloaded here; give the path .*encoder_weights=null"):
        load_encoder_weights(Segmenter(settings).network.encoder, settings)
    assert len(tried) == 1


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_of_a_local_file_are_loaded(tmp_path, suffix) -> None:
    source, target = (Segmenter(config(encoder="resnet18")).network.encoder for _ in range(2))
    path = tmp_path / f"resnet18.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save({name: value.contiguous() for name, value in source.state_dict().items()}, path)
    start = load_encoder_weights(target, config(encoder="resnet18", encoder_weights=str(path), encoder_patients="none"))
    assert start.startswith(f"resnet18.{suffix} sha256:")
    assert start.endswith(" (said to have seen none of the patients)")
    assert torch.equal(source.conv1.weight, target.conv1.weight)


def test_weights_of_another_network_or_of_none_are_refused(tmp_path) -> None:
    encoder = Segmenter(config(encoder="resnet18")).network.encoder
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in {
        "other.safetensors": "do not fit encoder resnet18",
        "text.pth": "not a file of weights",
        "absent.pth": "no such weights file",
    }.items():
        with pytest.raises(InputError, match=rf"{name}.*{message}"):
            load_encoder_weights(encoder, config(encoder="resnet18", encoder_weights=str(tmp_path / name)))


# Training


def test_a_trained_segmenter_finds_the_discs_of_the_test_part_and_remembers_what_it_saw(trained, cohort) -> None:
    table = evaluate(trained, cohort, "test")
    assert measures(table, TWO)["dice"] > 0.8
    assert table["slide"].unique().tolist() == ["slide d"]
    assert table["split"].unique().tolist() == ["test"]
    assert set(evaluate(trained, cohort, "train")["patient"]) == {"a", "b"}  # its own training part may be looked at
    header = read_header(trained)
    assert header.patients_seen == ("a", "b")
    assert header.notes["encoder_starts_from"] == "random"
    assert (header.size_px, header.mpp, header.cohort) == (PX, 1.0, cohort.fingerprint)


def test_a_finished_training_is_left_alone_and_its_folder_taken_for_no_other(cohort, trained) -> None:
    before = (trained / "model.safetensors").stat().st_mtime_ns
    train_segmenter(cohort, config(steps=30), trained, size_px=PX, seed=0)
    assert (trained / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match="belongs to another run"):
        train_segmenter(cohort, config(steps=30), trained, size_px=PX, seed=1)


def test_equal_seeds_give_equal_losses_and_other_seeds_others(cohort, tmp_path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train_segmenter(cohort, config(), tmp_path / name, size_px=PX, seed=seed)
    one, two, three = (pd.read_csv(tmp_path / name / "losses.csv") for name in ("one", "two", "three"))
    assert one.equals(two)
    assert not one["value"].equals(three["value"])
    assert set(one["name"]) == {"loss", "loss_dice", "loss_cross_entropy"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "fpn", "decoder_channels": None},  # fpn draws dropout
        {"subtype_weighting": 1.0, "mixup_alpha": 0.4, "copy_paste": CopyPasteConfig()},
    ],
)
def test_a_resumed_training_equals_an_uninterrupted_one(cohort, tmp_path, monkeypatch, changes) -> None:
    settings = config(steps=5, lr_schedule="cosine", ema_decay=0.9, **changes)
    train_segmenter(cohort, settings, tmp_path / "whole", size_px=PX, seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(training_module, "PatchBatches", _killed_at_step_3)
        with pytest.raises(RuntimeError, match="killed"):
            train_segmenter(cohort, settings, tmp_path / "resumed", size_px=PX, seed=0)
    assert (tmp_path / "resumed" / "last.ckpt").exists()
    train_segmenter(cohort, settings, tmp_path / "resumed", size_px=PX, seed=0)
    assert_equal_weights(tmp_path / "whole", tmp_path / "resumed")
    losses = [pd.read_csv(tmp_path / name / "losses.csv") for name in ("whole", "resumed")]
    assert losses[0].equals(losses[1])


def test_a_resumed_training_that_corrects_labels_equals_an_uninterrupted_one(
    cohort, trained, tmp_path, monkeypatch
) -> None:
    options = {"synthetic": make_set(tmp_path / "set"), "amount": 1.0, "size_px": PX, "seed": 0}
    options |= {"critic": trained, "ignore_above": 1.25, "border_um": 2.0}
    monkeypatch.setattr(training_module, "COUNTED_PATCHES", 8)
    settings = config(steps=5)
    train_segmenter(cohort, settings, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(training_module, "PatchBatches", _killed_at_step_3)
        with pytest.raises(RuntimeError, match="killed"):
            train_segmenter(cohort, settings, tmp_path / "resumed", **options)
    train_segmenter(cohort, settings, tmp_path / "resumed", **options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "resumed")
    assert weights(tmp_path / "whole").keys() == weights(trained).keys()
    assert read_header(tmp_path / "whole").notes["ignore_above"] == 1.25


@pytest.mark.parametrize("option", [{"ignore_above": 1.25}, {"border_um": 2.0}])
def test_corrected_labels_are_another_training(cohort, trained, tmp_path, monkeypatch, option) -> None:
    monkeypatch.setattr(corrections, "TEACHER_IS_SURE", 0.5)  # four steps teach little
    monkeypatch.setattr(corrections, "COUNTED_PATCHES", 8)
    options = {"synthetic": make_set(tmp_path / "set"), "amount": 1.0, "size_px": PX, "seed": 0}
    train_segmenter(cohort, config(steps=4), tmp_path / "plain", **options)
    critic = {"critic": trained} if "ignore_above" in option else {}
    train_segmenter(cohort, config(steps=4), tmp_path / "corrected", **options, **critic, **option)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "corrected")
    assert any(not torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(MismatchError):
        train_segmenter(cohort, config(steps=4), tmp_path / "plain", **options, **critic, **option)


def test_a_critic_needs_its_limit_and_is_recorded(cohort, trained, tmp_path) -> None:
    options = {"synthetic": make_set(tmp_path / "set"), "amount": 1.0, "size_px": PX, "seed": 0}
    for lone in ({"critic": trained}, {"ignore_above": 1.25}):
        with pytest.raises(InputError, match="need each other"):
            train_segmenter(cohort, config(steps=2), tmp_path / "a", **options, **lone)
    train_segmenter(cohort, config(steps=2), tmp_path / "a", **options, critic=trained, ignore_above=1.25)
    assert read_header(tmp_path / "a").notes["critic"] == read_header(trained).sha256


def test_a_critic_disagrees_where_a_label_is_wrong_and_hardly_elsewhere(cohort, trained) -> None:
    sampler = PatchSampler(cohort, "train", PX, seed=1)
    critic = Critic.of(trained, sampler, config(), 1.25)
    patches = [sampler[i] for i in range(8)]
    images = torch.from_numpy(np.stack([patch.image for patch in patches]))
    labels = torch.from_numpy(np.stack([patch.label_mask for patch in patches]))
    swapped = torch.where(labels == 0, 1, 0).to(torch.uint8)
    assert critic(images, swapped).float().mean() > 0.8
    assert critic(images, labels).float().mean() < 0.3


def test_a_label_follows_a_sure_average_near_borders_alone() -> None:
    labels = torch.zeros(1, 9, 9, dtype=torch.uint8)
    labels[:, :, 4:], labels[:, 0, 4] = 2, IGNORE
    tumour = torch.full((1, 9, 9), 0.6)
    assert torch.equal(border_labels(labels, tumour, 2), labels)  # it is not sure
    sure_of_background = border_labels(labels, torch.zeros(1, 9, 9), 2)
    assert sure_of_background[0, 4].tolist() == [0, 0, 0, 0, 0, 0, 2, 2, 2]
    sure_of_tumour = border_labels(labels, torch.ones(1, 9, 9), 1)
    assert sure_of_tumour[0, 4].tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 2]
    assert (sure_of_background[0, 0, 4], sure_of_tumour[0, 0, 4]) == (IGNORE, IGNORE)
    assert torch.equal(border_labels(labels[..., 5:], torch.zeros(1, 9, 4), 2), labels[..., 5:])  # no border here


def _killed_at_step_3(*args):
    from counterstain.data.sampling import PatchBatches

    batches = PatchBatches(*args)

    def batch(step):
        if step == 3:
            raise RuntimeError("killed")
        return batches(step)

    return batch


@pytest.mark.parametrize(
    ("changes", "size_px", "error", "message"),
    [
        ({}, 40, ConfigError, r"size_px 40: .* multiple of 32"),
        (
            {"inference": InferenceConfig(overlap_px=32)},
            PX,
            ConfigError,
            "overlap_px 32: expected less than the window",
        ),
        ({"encoder_weights": "absent.pth"}, PX, InputError, "absent.pth: no such weights file"),
        (
            {"inference": InferenceConfig(window_px=32768)},
            PX,
            ConfigError,
            "too many windows of 32768 px .*; give a sm",
        ),
        ({"inference": InferenceConfig(batch_size=10**9)}, PX, ConfigError, "give a batch_size of 262144 at most"),
    ],
)
def test_a_training_that_cannot_be_leaves_its_folder_free(cohort, tmp_path, changes, size_px, error, message) -> None:
    with pytest.raises(error, match=message):
        train_segmenter(cohort, config(**changes), tmp_path / "out", size_px=size_px, seed=0)
    assert not (tmp_path / "out").exists()


# Synthetic patches


def test_an_amount_mixes_the_set_in_and_its_patients_are_remembered(cohort, tmp_path) -> None:
    synthetic = make_set(tmp_path / "set", seen=("a", "from elsewhere"))
    out = train_segmenter(cohort, config(), tmp_path / "out", size_px=PX, seed=0, synthetic=synthetic, amount=1.0)
    header = read_header(out)
    assert header.patients_seen == ("a", "b", "from elsewhere")
    assert (header.notes["synthetic_patches"], header.notes["synthetic_share"]) == (4, 0.5)


def test_a_set_that_was_made_longer_is_the_same_set(cohort, tmp_path) -> None:
    options = {"size_px": PX, "seed": 0, "amount": 1.0}
    out = train_segmenter(cohort, config(), tmp_path / "out", synthetic=make_set(tmp_path / "short"), **options)
    before = (out / "model.safetensors").stat().st_mtime_ns
    train_segmenter(cohort, config(), out, synthetic=make_set(tmp_path / "long", count=8), **options)
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_synthetic_patches_alone_train_a_segmenter(cohort, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("counterstain.training_run.PatchSampler", _NoRealPatch)
    train_segmenter(
        cohort, config(), tmp_path / "out", size_px=PX, seed=0, synthetic=make_set(tmp_path / "set"), amount=1, share=1
    )


class _NoRealPatch:
    missing_subtypes = ()

    def __init__(self, *_) -> None: ...

    def __getitem__(self, index):
        raise AssertionError("a real patch was drawn")


@pytest.mark.parametrize(
    ("how", "amount", "error", "message"),
    [
        ({"seen": ("a", "c")}, 1, LeakageError, "synthetic set .*val"),
        ({"patient": "d"}, 1, LeakageError, "synthetic set .*test"),
        ({"taxonomy": OTHER}, 1, MismatchError, "has the subtypes pale, odd; this cohort has pale, dark"),
        ({"size_px": 64}, 1, MismatchError, "has patches of 64 px, the segmenter trains on 32 px"),
        ({"mpp": 0.5}, 1, MismatchError, "is at 0.5 um/px, this cohort at 1.0"),
        ({}, 2, InputError, "has 4 patches, 8 are needed; synthesize more"),
        ({}, 0, InputError, "given with amount 0"),
        (None, 1, InputError, "without a synthetic set"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(cohort, tmp_path, how, amount, error, message) -> None:
    synthetic = None if how is None else make_set(tmp_path / "set", **how)
    with pytest.raises(error, match=message):
        train_segmenter(cohort, config(), tmp_path / "out", size_px=PX, seed=0, synthetic=synthetic, amount=amount)
    assert not (tmp_path / "out").exists()


# Evaluation


def test_it_is_evaluated_on_any_cohort_of_the_same_subtypes(trained, tmp_path) -> None:
    elsewhere = make_cohort(tmp_path / "elsewhere", mpp=1.04, split={"x": None, "y": None}, seed=1)
    table = evaluate(trained, elsewhere, "all")
    assert by_slide(table).shape == (2, 3, 2)
    assert pooled(table).sum() == 4 * 48 * 48
    assert table["split"].isna().all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"taxonomy": OTHER}, "was trained on the subtypes pale, dark; this cohort has pale, odd"),
        ({"mpp": 0.9}, r"was trained at 1 um/px, .* is at 0.9 um/px"),
    ],
)
def test_a_cohort_that_does_not_fit_is_refused(trained, tmp_path, how, message) -> None:
    with pytest.raises(MismatchError, match=message):
        evaluate(trained, make_cohort(tmp_path / "other", **how), "test")


def test_patients_that_it_saw_are_refused_and_nothing_is_written(trained, tmp_path) -> None:
    swapped = make_cohort(tmp_path / "swapped", split={"a": "test", "x": "train"})
    for part in ("test", "all"):
        with pytest.raises(LeakageError, match=r"has seen a of .*; evaluate it on patients"):
            evaluate(trained, swapped, part)
    done = invoke("evaluate", trained, swapped.folder, "--out", tmp_path / "scores")
    assert isinstance(done.exception, LeakageError)
    assert not (tmp_path / "scores").exists()


def test_an_unfinished_checkpoint_and_an_unknown_part_or_device_are_refused(trained, cohort, tmp_path) -> None:
    unfinished = shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("model.json"))
    with pytest.raises(InputError, match="training was interrupted"):
        evaluate(unfinished, cohort, "test")
    with pytest.raises(InputError, match="split 'tset': expected one of train, val, test, all"):
        evaluate(trained, cohort, "tset")
    with pytest.raises(InputError, match="device 'tpu': not found"):
        evaluate(trained, cohort, "test", device="tpu")


# Command line

TINY = [
    argument
    for setting in ("size_px=32", "segmenter.training.steps=1", "segmenter.training.batch_size=2",
                    "segmenter.training.precision='32'", "segmenter.training.accelerator=cpu",
                    "segmenter.encoder=tu-test_resnet", "segmenter.mixing.epoch_patches=2")
    for argument in ("--set", setting)
]  # fmt: skip


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_trains_and_scores_a_segmenter(cohort, tmp_path) -> None:
    make_set(tmp_path / "set")
    out, scores = tmp_path / "segmenter", tmp_path / "scores"
    mixed = ["--synthetic", tmp_path / "set", "--amount", "0.5"]
    done = invoke("segment", cohort.folder, "--out", out, "--preset", "demo", *mixed, *TINY)
    assert done.exit_code == 0, done.output
    assert read_header(out).notes["synthetic_patches"] == 1
    done = invoke("evaluate", out, cohort.folder, "--split", "val", "--out", scores)
    assert done.exit_code == 0, done.output
    assert "recall of dark" in done.output
    assert "slides of one patient: they say nothing of other patients" in done.output
    found = pd.read_csv(scores / "measures.csv").iloc[0]
    table = pd.read_parquet(scores / "counts.parquet")
    assert found["split"] == "val"
    assert found.drop("split").to_dict() == pytest.approx(measures(table, TWO), nan_ok=True)


def test_a_score_comes_with_an_interval_over_patients_and_what_it_rests_on(trained, tmp_path) -> None:
    elsewhere = make_cohort(tmp_path / "elsewhere", split=dict.fromkeys("uvwxyz"), seed=1)
    scores = cs.evaluate(trained, elsewhere, split="all")
    summary = scores.attrs["summary"].set_index("measure")
    assert list(summary.index) == ["Dice", "recall of pale", "recall of dark", "variance of the recalls"]
    assert summary["value"].tolist() == pytest.approx(
        [scores[name] for name in ("dice", "recall_pale", "recall_dark", "subtype_variance")]
    )
    assert (summary["low"] <= summary["value"]).all()
    assert (summary["value"] <= summary["high"]).all()
    assert summary.loc["Dice", ["patients", "slides", "instances"]].tolist() == [6, 6, 24]
    assert summary.loc["recall of dark", ["patients", "slides", "instances"]].tolist() == [6, 6, 12]
    one = cs.evaluate(trained, make_cohort(tmp_path / "one", split={"z": None}, seed=2), split="all").attrs["summary"]
    assert one[["low", "high"]].isna().all(axis=None)


def test_of_subtypes_the_probability_of_tissue_is_one_minus_that_of_background():
    torch.manual_seed(0)
    model = Segmenter(config(classes="subtypes"), num_labels=6).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        shares = model(torch.from_numpy(image)[None]).softmax(1)[0].numpy()
    [found] = sliding_window_inference(model, [image], Windows(64, 0, 1))
    np.testing.assert_allclose(found, 1 - shares[0], atol=1e-5)
    [canvas] = filled(model, [Canvas(image, Windows(64, 0, 1))], 1)
    np.testing.assert_array_equal(canvas.tumour()[1], shares[1:].argmax(0) + 1)


def test_a_segmenter_learns_to_tell_subtypes_and_is_evaluated_as_any_other(tmp_path):
    cohort = make_cohort(tmp_path / "cohort")
    settings = config(steps=4, classes="subtypes")
    folder = train_segmenter(cohort, settings, tmp_path / "s", size_px=PX, seed=0)
    model, header = load_segmenter(folder)
    assert header.config["classes"] == "subtypes"
    assert model(torch.zeros(1, PX, PX, 3, dtype=torch.uint8)).shape[1] == cohort.taxonomy.num_labels
    assert evaluate(folder, cohort, "test")["predicted_background"].sum() > 0


@pytest.mark.parametrize("classes", [2, 3])
def test_a_perfect_prediction_of_each_class_costs_nothing(classes):
    labels = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    truth = labels.clamp(max=classes - 1).long()
    logits = 50 * torch.nn.functional.one_hot(truth, classes).movedim(-1, 1).float()
    assert dice_loss(logits, labels) == pytest.approx(0, abs=1e-6)
    assert cross_entropy_loss(logits, labels) == pytest.approx(0, abs=1e-6)


def test_a_vision_transformer_is_an_encoder_with_the_weights_that_timm_saved(tmp_path):
    torch.manual_seed(0)
    saved = timm.create_model("test_vit", pretrained=False, num_classes=0, init_values=1e-5)
    timm.models.save_for_hf(saved, tmp_path / "vit", safe_serialization=True)
    settings = {"architecture": "dpt", "encoder": "tu-test_vit", "encoder_depth": 4, "encoder_patients": "none"}
    settings |= {"encoder_options": {"init_values": 1e-5}, "encoder_weights": str(tmp_path / "vit")}
    config = SegmenterConfig(**settings)
    model = Segmenter(config).eval()
    assert "model.safetensors sha256:" in load_encoder_weights(model.network.encoder, config)
    assert torch.equal(model.network.encoder.model.blocks[0].ls1.gamma, saved.blocks[0].ls1.gamma)
    assert model(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 2, 64, 64)
    header = CheckpointHeader(
        kind="segmenter", taxonomy=HER2, size_px=64, mpp=0.5, seed=0, cohort="", patients_seen=(),
        config=config.model_dump(mode="json"),
    )  # fmt: skip
    save_checkpoint(tmp_path / "s", model.state_dict(), header)
    images = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(load_segmenter(tmp_path / "s")[0](images), model(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "unet", "encoder": "tu-test_vit"}, "for vision transformers set architecture to dpt"),
        ({"architecture": "dpt", "encoder": "tu-test_vit"}, "encoder_depth 5: dpt reads a transformer at 4 depths"),
        (
            {"architecture": "dpt", "encoder": "tu-vit_small_patch14_dinov2", "encoder_depth": 4},
            "patches are 14 px wide",
        ),
        ({"encoder_options": {"init_values": 1}}, "encoder_options: resnet34 takes none"),
    ],
)
def test_transformers_that_no_decoder_takes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Segmenter(SegmenterConfig(**{"encoder_weights": None} | settings))
