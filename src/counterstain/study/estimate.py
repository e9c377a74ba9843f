"""What a study will take on this machine: a few steps of each of its networks, timed once, and added up over its cells.

A timing runs what the cells run, on the study's own cohort (a phantom: some slides of it), in a folder that is removed
afterwards: trainings of a few steps, a few images of each method, some windows. Any method of the registry is timed in
this way. Timings are kept in the user's cache folder, by settings, cohort, machine and version, so that a plan whose
networks were timed before needs no torch, and adding up needs none at all.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from counterstain import __version__
from counterstain.config import build
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import SHARD_PATCHES, PatchSetHeader, PatchSetWriter, SyntheticPatch
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.split import SplitConfig, split_cohort, validating
from counterstain.errors import CounterstainError
from counterstain.generators.methods import METHODS
from counterstain.progress import overheard
from counterstain.segmentation.mixing import MixingConfig, training_steps
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.storage import fingerprint, read_json, write_json
from counterstain.study.cells import PARTS, Cell
from counterstain.study.config import StudyConfig, trainings
from counterstain.study.status import Expected
from counterstain.synthesis.masks import SynthesisConfig

if TYPE_CHECKING:
    from counterstain.synthesis.masks import Layout

FORMAT = 1
FEW = 2  # patches or images at once, where more would take long
MOST_STEPS = 8  # that are timed
PATIENCE_SECONDS = 10.0  # for a timing of whole batches; where they take longer, ``FEW`` patches stand for them
POOL = 16  # patches encoded beforehand
BRIEF_SAMPLING = (4, 8)  # steps, from which follows what more take
IMAGES = 16  # drawn at once, where the method does not say
PHANTOM_SLIDES = 6
ON_ONE_DEVICE = {"devices": 1, "num_nodes": 1, "log_every_steps": 1, "logger": None}
BYTES_A_PIXEL = 1.0  # of the gallery's pictures, WebP and PNG


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a piece of work takes: once, and for each step of a training, image, slide, or pixel to evaluate."""

    seconds_once: float = 0.0
    seconds_each: float = 0.0
    bytes_once: float = 0.0
    bytes_each: float = 0.0

    def of(self, amount: float) -> Expected:
        """Return what an amount takes."""
        seconds, size_bytes = (each * amount for each in (self.seconds_each, self.bytes_each))
        return Expected(self.seconds_once + seconds, self.bytes_once + size_bytes)


@dataclass(frozen=True)
class Work:
    """Work that cells share but for its amount, and the first cell that does it."""

    key: str
    cell: Cell


class Estimate:
    """The works of a study's cells and their timings, as far as there are any."""

    def __init__(self, study: StudyConfig, cells: Sequence[Cell], *, threads: int | None) -> None:
        self._study, self._threads = study, threads
        self._cells = {cell.folder: cell for cell in cells}
        self._works: dict[tuple[str, ...], Work] = {}
        self._work_of = {cell.folder: self._work(cell) for cell in cells}
        self._timings = {work.key: _read(work.key) for work in self._works.values()}
        self.failures: dict[str, str] = {}  # key of a work -> why it could not be timed

    def untimed(self) -> list[Work]:
        """Return the works that are not timed yet on this machine, each after those it needs."""
        return list({w.key: w for w in self._works.values() if self._timings[w.key] is None}.values())

    def expected(self) -> dict[str, Expected]:
        """Return what each cell should take, by its folder; cells whose work is not timed are left out."""
        found = {folder: self._timings[work.key] for folder, work in self._work_of.items()}
        return {folder: timing.of(self._amount(self._cells[folder])) for folder, timing in found.items() if timing}

    @property
    def picture_bytes(self) -> float:
        """What the pictures in the results take."""
        sets = {cell.set_name: int(cell.settings["size_px"]) for cell in self._cells.values() if cell.set_name}
        return sum(2 * self._study.gallery * size_px**2 * BYTES_A_PIXEL for size_px in sets.values())

    def measure(self, root: Path, advance: Callable[[int], None]) -> None:
        """Time what is not timed yet; ``root`` is the folder of the study's cells, ``advance`` is told of each work."""
        from counterstain.study.executors import with_threads

        with (
            tempfile.TemporaryDirectory(prefix="counterstain-timing-", ignore_cleanup_errors=True) as folder,
            with_threads(self._threads),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of few steps, few patches and weights that are not trained
            bench = _Bench(self._cells, root, Path(folder))
            for work in self.untimed():
                try:
                    self._timings[work.key] = timing = bench.timing(work.cell)
                    with suppress(OSError):  # where nothing can be kept, the next plan times it anew
                        _cache().mkdir(parents=True, exist_ok=True)
                        write_json(_cache() / f"{work.key}.json", asdict(timing))
                except (CounterstainError, RuntimeError) as error:  # among them that memory does not suffice
                    self.failures[work.key] = f": {error}".partition("\n")[0]
                advance(1)

    def _work(self, cell: Cell) -> Work:
        """Return a cell's work; that of 10,000 cells is looked up, not described anew."""
        short = (cell.stage, "" if cell.stage == "evaluation" else cell.arm or cell.set_name or cell.name)
        if short not in self._works:
            described = [FORMAT, _machine(self._threads), self._described(cell)]
            self._works[short] = Work(fingerprint(described)[:24], cell)
        return self._works[short]

    def _described(self, cell: Cell) -> Any:
        """Return all that the time of a cell's work depends on but for its amount."""
        cell = (
            self._cells[cell.inputs["whole"]] if "cross_fit" in cell.settings else cell
        )  # fewer patients take as long
        left_out = {"seed", "filter", "amount", "share", "set", "first", "end", "ignore_above", "border_um", "fold"}
        settings = {name: value for name, value in cell.settings.items() if name not in left_out}
        if "config" in settings and "training" in settings["config"]:
            config = dict(settings["config"])
            config["training"] = {name: value for name, value in config["training"].items() if name != "steps"}
            config["sampling"] = {name: value for name, value in config.get("sampling", {}).items() if name != "mode"}
            settings["config"] = config
        needs = {role: self._described(self._cells[folder]) for role, folder in _needs(cell).items()}
        return ["synthetic" if cell.stage == "shards" else cell.stage, settings, needs]

    def _amount(self, cell: Cell) -> float:
        if cell.stage == "cohort":
            return float(cell.settings["phantom"]["slides"]) if "phantom" in cell.settings else 0.0
        if cell.stage == "evaluation":
            return self._evaluated_px
        if cell.stage == "shards":
            return float(SHARD_PATCHES * (cell.settings["end"] - cell.settings["first"]))
        if cell.stage == "synthetic":
            return 0.0 if cell.after else float(SHARD_PATCHES * -(-cell.count // SHARD_PATCHES))
        config = cell.settings.get("config", {})
        steps, amount = int(config.get("training", {}).get("steps", 0)), float(cell.settings.get("amount", 0))
        return training_steps(steps, amount, build(MixingConfig, config["mixing"])) if amount else steps

    @cached_property
    def _evaluated_px(self) -> float:
        """Pixels of the parts that every segmenter is evaluated on, of folds their mean."""
        source, phantom = self._study.cohort, self._study.cohort.phantom or PhantomConfig()
        folds = max(cell.fold for cell in self._cells.values())
        patients, px = phantom.slides, phantom.slides * phantom.regions_per_slide * phantom.size_px**2
        evaluated = source.split.val + source.split.test  # patients, or their share
        share = evaluated if source.split.train + evaluated <= 1.001 else evaluated / patients
        if source.path is not None:
            regions = Cohort.open(source.path).regions.loc[lambda table: table["split"].isin(PARTS) | (folds > 0)]
            px, share = int((regions["height_px"] * regions["width_px"]).sum()), 1.0
            patients = regions["patient"].nunique()
        return px * (1 / folds + validating(patients, source.validation) / patients if folds else share)


class _Bench:
    """Times the work of cells in a folder that holds what comes of it, until it is removed."""

    def __init__(self, cells: Mapping[str, Cell], root: Path, folder: Path) -> None:
        self._cells, self._root, self._folder = cells, root, folder
        self._timings: dict[str, Timing] = {}

    def timing(self, cell: Cell) -> Timing:
        """Time the work of a cell, after that of the cells whose result it needs."""
        from counterstain.devices import free_memory

        if cell.folder not in self._timings:
            for needed in [one for folder in _needs(cell).values() if (one := self._cells[folder]).stage != "cohort"]:
                self.timing(needed)
            self._timings[cell.folder] = TIMERS.get(cell.stage, _Bench.of_training)(self, cell)
            free_memory()
        return self._timings[cell.folder]

    def _input(self, cell: Cell, role: str) -> Path:
        return self._folder / cell.inputs[role]

    @cached_property
    def _cohort(self) -> Cohort:
        """The study's cohort; of a phantom that is not made yet, some slides."""
        from counterstain.study.stages import cohort_of_fold, open_cohort

        cell = next(iter(self._cells.values()))
        place = cell.details.get("path") or cell.details.get("whole_path")
        if not place and not (self._root / cell.folder / "cohort" / "cohort.json").exists():
            self.timing(cell)
            return Cohort.open(self._folder / "cohort")
        whole = Cohort.open(place) if place else open_cohort(self._root / cell.folder)
        fold = next((cell for cell in self._cells.values() if cell.fold), None)
        return whole if fold is None else cohort_of_fold(whole, fold, self._folder / "fold")

    def of_cohort(self, cell: Cell) -> Timing:
        from counterstain.data.phantom import write_phantom

        if "phantom" not in cell.settings:
            return Timing(seconds_once=1.0)  # it is opened, or its tables are copied
        config, folder = build(PhantomConfig, cell.settings["phantom"]), self._folder / "cohort"
        slides = min(max(config.slides, 3), PHANTOM_SLIDES)
        start = time.perf_counter()
        cohort = write_phantom(config.model_copy(update={"slides": slides}), folder)
        seconds = time.perf_counter() - start
        split_cohort(cohort, SplitConfig(train=slides - 2, val=1, test=1))
        return Timing(seconds_each=seconds / slides, bytes_each=_size_of(folder) / slides)

    def of_training(self, cell: Cell) -> Timing:
        training = trainings()[cell.stage]
        config = build(training.config_class, cell.settings["config"]).model_copy(update=training.timed_with)
        needs = {stage: self._input(cell, stage) for stage in training.needs}
        return self._of_steps(cell, config, partial(training.train, **needs))

    def of_segmenter(self, cell: Cell) -> Timing:
        from counterstain.segmentation.train import train_segmenter

        config = build(SegmenterConfig, cell.settings["config"])
        return self._of_steps(cell, config.model_copy(update={"encoder_weights": None}), train_segmenter)

    def _of_steps(self, cell: Cell, config: Any, train: Callable[..., Any]) -> Timing:
        """Train for a few steps, in whole batches unless they would take too long."""
        options = {name: int(cell.settings[name]) for name in ("size_px", "seed")}
        if not hasattr(config, "training"):  # of another package; it takes no steps of ours
            start = time.perf_counter()
            train(self._cohort, config, self._folder / cell.folder, **options)
            return Timing(seconds_once=time.perf_counter() - start, bytes_once=_size_of(self._folder / cell.folder))
        training, pool = config.training, getattr(config, "latent_pool", None) or 0

        def timed(batch_size: int, accumulate: int, steps: int) -> Timing:
            changes = {"batch_size": batch_size, "accumulate": accumulate, "steps": steps + 1}  # the first is not timed
            brief = {"training": training.model_copy(update=changes | ON_ONE_DEVICE)}
            brief |= {"latent_pool": min(pool, POOL)} if pool else {}
            out = self._folder / cell.folder
            shutil.rmtree(out, ignore_errors=True)
            with overheard() as bars:
                train(self._cohort, config.model_copy(update=brief), out, **options)
            once, each = bars.seconds(steps + 1, prepared=pool / min(pool, POOL) if pool else 1.0)
            return Timing(seconds_once=once, seconds_each=each, bytes_once=_size_of(out))

        whole = training.batch_size // (training.devices * training.num_nodes)  # what one device does
        few = min(FEW, whole)
        first = timed(few, 1, 1)
        seconds = first.seconds_each * whole / few
        if few < whole and FEW * seconds > PATIENCE_SECONDS:
            return replace(first, seconds_each=seconds)
        return timed(whole, training.accumulate, max(FEW, min(MOST_STEPS, int(PATIENCE_SECONDS / seconds))))

    def of_drawing(self, cell: Cell) -> Timing:
        """Draw a few images; write a shard of real ones, since those of networks without training compress badly."""
        from counterstain.generators.interface import DrawRequest, load_generator
        from counterstain.synthesis.masks import Layouts

        # The masks of a shard, and what it takes to write them.
        config, size_px = build(SynthesisConfig, cell.settings["config"]), int(cell.settings["size_px"])
        start = time.perf_counter()
        layouts = Layouts.of(self._cohort, config, size_px=size_px, seed=0)(0)
        written = self._write(layouts, cell)
        around = (time.perf_counter() - start) / SHARD_PATCHES

        # Images, as many at once as the cell draws unless that would take too long.
        method = METHODS[cell.settings["method"]]
        checkpoint = self._input(cell, "generator") if "generator" in cell.inputs else None
        drawing = {name: cell.settings[name] for name in method.drawing}
        loading: list[float] = []

        def seconds_of_one(count: int, changes: Mapping[str, Any]) -> float:
            changed = {"sampler": drawing["sampler"] | changes} if changes else {}
            start = time.perf_counter()
            generator = load_generator(method.name, checkpoint, self._cohort, drawing | changed)
            loading.append(time.perf_counter() - start)
            requests = [DrawRequest.of(layout.patch, i, layout.redraw) for i, layout in enumerate(layouts[:count])]
            return _typical_seconds(lambda: generator.draw(requests)) / count

        each = _in_steps(drawing["sampler"], seconds_of_one) if "sampler" in drawing else seconds_of_one(IMAGES, {})
        return Timing(seconds_once=min(loading), seconds_each=around + each, bytes_each=written / SHARD_PATCHES)

    def _write(self, layouts: Sequence[Layout], cell: Cell) -> int:
        """Write a shard of real patches and return its bytes."""
        known = {"method": "real", "taxonomy": self._cohort.taxonomy, "mpp": self._cohort.mpp, "version": __version__}
        known |= {"size_px": cell.settings["size_px"], "count": SHARD_PATCHES, "seed": 0, "settings": {}}
        header = PatchSetHeader(**known, cohort="", generator="", patients_seen=())
        made = [
            SyntheticPatch(index=i, patch=each.patch, subtypes_before=each.before, seed=0)
            for i, each in enumerate(layouts)
        ]
        PatchSetWriter(self._folder / cell.folder, header).write(0, made)
        return _size_of(self._folder / cell.folder)

    def of_evaluation(self, cell: Cell) -> Timing:
        """Segment windows of validation regions, about a batch of them."""
        from counterstain.devices import choose_device
        from counterstain.segmentation.inference import sliding_window_inference
        from counterstain.segmentation.model import load_segmenter

        start = time.perf_counter()
        model, header = load_segmenter(self._input(cell, "segmenter"))
        model.to(choose_device())
        once = time.perf_counter() - start
        windows = model.config.inference.windows(header.size_px)

        # Corners of regions that make up a batch of windows.
        wanted_px, read_px, cut_px = windows.batch_size * (windows.size_px - windows.overlap_px) ** 2, 0, 0
        corners: list[np.ndarray] = []
        edge = windows.overlap_px + round(wanted_px**0.5)
        start = time.perf_counter()
        regions = self._cohort.positions("val").tolist()
        while cut_px < wanted_px:  # of few regions more than once: a batch is always full
            image = self._cohort.read(regions[len(corners) % len(regions)])[0]
            corners.append(image[:edge, :edge])
            read_px, cut_px = read_px + image[..., 0].size, cut_px + corners[-1][..., 0].size
        reading = (time.perf_counter() - start) / read_px
        segmenting = _typical_seconds(lambda: list(sliding_window_inference(model, corners, windows))) / cut_px
        return Timing(seconds_once=once, seconds_each=reading + segmenting)


TIMERS: dict[str, Callable[[_Bench, Cell], Timing]] = {
    "cohort": _Bench.of_cohort,
    "shards": _Bench.of_drawing,
    "synthetic": _Bench.of_drawing,
    "segmenter": _Bench.of_segmenter,
    "evaluation": _Bench.of_evaluation,
    **dict.fromkeys(("hardness", "amount"), lambda _bench, _cell: Timing()),
}
"""Stage -> what times its cells; the other stages are trainings."""


def _in_steps(sampler: Mapping[str, Any], seconds_of_one: Callable[[int, Mapping[str, Any]], float]) -> float:
    """Return the seconds of an image that is drawn in steps: of few steps, prolonged."""
    steps, whole = int(sampler["steps"]), int(sampler["compute_batch"])

    def at(count: int) -> float:
        fewer, more = BRIEF_SAMPLING
        if steps <= more:
            return seconds_of_one(count, {"compute_batch": count})
        low, high = (seconds_of_one(count, {"compute_batch": count, "steps": few}) for few in BRIEF_SAMPLING)
        return low + max(0.0, high - low) / (more - fewer) * (steps - fewer)

    few = min(FEW, whole)
    seconds = at(few)
    return seconds if few == whole or seconds * whole > PATIENCE_SECONDS else at(whole)


def _typical_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call: of the second to fourth one, or of the first where that takes long."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
        if taken[0] > PATIENCE_SECONDS / 4:
            return taken[0]
    return median(taken[1:])


def _needs(cell: Cell) -> dict[str, str]:
    """Return the inputs that a cell's time depends on."""
    left_out = {"judge", "synthetic", "critic", "hardness", "amount"}
    return {role: folder for role, folder in cell.inputs.items() if role not in left_out and ", fit " not in role}


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _machine(threads: int | None) -> list[Any]:
    """Return what timings depend on beside settings and cohort."""
    machine = [platform.node(), os.cpu_count(), threads, os.environ.get("CUDA_VISIBLE_DEVICES")]
    return [*machine, version("torch"), __version__]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "counterstain" / "timings"


def _read(key: str) -> Timing | None:
    """Return a timing from the cache; None where there is none, or none that can be read."""
    with suppress(CounterstainError, TypeError):
        return Timing(**read_json(_cache() / f"{key}.json"))
    return None
