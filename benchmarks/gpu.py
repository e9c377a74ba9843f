"""Time every network of the presets, in training and in drawing, and print one table; on a GPU, it takes some minutes.

    python benchmarks/gpu.py [--out out/gpu] [--seconds 4] [--presets paper best] [--sizes 512 256] [--tiny]

On a phantom that it makes, SPADE, the first stage, the denoiser and the segmenter of ``paper`` and ``best`` are trained
for some seconds by the functions that studies call, and images are drawn with DDIM 200, 16 steps, few steps and SPADE.
``ratio`` says how many times as fast that is as plain code in the same run: for the denoiser what one writes with
diffusers (:mod:`training_step`), for the others their losses in a loop of torch's; fp32 without TF32, no workers.
Drawing is held against a plain loop of diffusers' DDIM with 200 steps. ``waiting`` is the share of a step that
vanishes when the same batch is given again and again. Speed does not depend on what weights are: they are random, and
few steps are drawn with a network that is not distilled. Rows are written as they come: ``gpu.csv``, ``gpu.md``. With
``--tiny`` it runs on a CPU in seconds, with networks too small to mean anything.
"""

import argparse
import dataclasses
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from training_step import PlainDiffusion, PlainPatches, Turns

from counterstain.data.patches import Patch
from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.sampling import PatchBatches, PatchSampler
from counterstain.data.split import SplitConfig, split_cohort
from counterstain.devices import choose_device, free_memory
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.interface import DrawRequest, load_generator
from counterstain.generators.methods import METHODS
from counterstain.generators.pipeline import to_images
from counterstain.generators.spade import Spade
from counterstain.progress import overheard
from counterstain.recipe import Recipe, load_recipe
from counterstain.segmentation.model import Segmenter
from counterstain.segmentation.train import train_segmenter
from counterstain.training import Trainable

NETWORKS = {"SPADE": "spade", "first stage": "autoencoder", "denoiser": "diffusion", "segmenter": "segmenter"}
WARM_STEPS, FEWEST_STEPS = 4, 4
TINY = (
    "spade.generator_width=4", "spade.discriminator_width=4", "spade.hidden=4", "spade.latent=4", "spade.vgg_weight=0",
    "autoencoder.channels=8", "autoencoder.discriminator_width=4", "autoencoder.codebook_size=64",
    "autoencoder.lpips_weight=0", "diffusion.channels=8", "diffusion.multipliers=[1, 2]", "diffusion.heads=2",
    "segmenter.encoder=tu-test_resnet", "segmenter.encoder_depth=3", "segmenter.decoder_channels=[8, 8, 8]",
    *(f"{name}.training.batch_size=2" for name in NETWORKS.values()),
)  # fmt: skip


@dataclass(kw_only=True)
class Row:
    """One line of the table."""

    part: str
    preset: str
    size_px: int
    network: str
    variant: str
    batch: int
    seconds_a_step: float | None = None
    images_a_second: float | None = None
    peak_gib: float | None = None
    waiting: float | None = None
    ratio: float | None = None
    note: str = ""


class Bench:
    """Trains and draws with one preset at one size after another, and keeps the rows."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.rows = arguments, folder, list[Row]()
        size_px = max(arguments.sizes)
        config = PhantomConfig(slides=6, regions_per_slide=1, size_px=size_px + size_px // 4, mpp=0.5)
        self.cohort, _ = split_cohort(write_phantom(config, folder / "cohort"), SplitConfig(train=4, val=1, test=1))

    def do(self, row: Row, work: Callable[[Row], None]) -> None:
        """Fill a row in, and write the table anew."""
        free_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            work(row)
        except RuntimeError as error:  # memory that does not suffice must not end the run
            row.note = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
        if torch.cuda.is_available():
            row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        self.rows.append(row)
        print(summary(row), flush=True)
        write(self.rows, self.arguments.out)


@dataclass
class Preset:
    """The networks of a preset at one size; their checkpoints come from the trainings that are timed."""

    bench: Bench
    name: str
    size_px: int

    def __post_init__(self) -> None:
        names = ("spade", "autoencoder", "diffusion", "segmenter")
        settings = [f"size_px={self.size_px}", "segmenter.encoder_weights=null"]
        settings += [f"{name}.training.checkpoint_every_steps=1000000" for name in names]
        self.recipe: Recipe = load_recipe(self.name, None, [*settings, *(TINY if self.bench.arguments.tiny else ())])
        self.folder, self.cohort = self.bench.folder / f"{self.name}-{self.size_px}", self.bench.cohort

    def row(self, part: str, network: str, variant: str, batch: int) -> Row:
        """Return an empty row."""
        known = {"preset": self.name, "size_px": self.size_px, "network": network}
        return Row(part=part, **known, variant=variant, batch=batch)  # type: ignore[arg-type]

    def config(self, network: str) -> Any:
        """Return a network's settings, with random weights in the place of those that would have to be fetched."""
        stage = NETWORKS[network]
        training = METHODS.trainings.get(stage)
        return getattr(self.recipe, stage).model_copy(update=training.timed_with if training else {})

    def sampler(self, network: str) -> PatchSampler:
        """Return a network's stream of patches."""
        return PatchSampler(self.cohort, "train", self.size_px, self.config(network).sampling, 0)

    def train(self, network: str, steps: int) -> float:
        """Train as a study does; return the seconds of a step and leave the checkpoint."""
        stage, config = NETWORKS[network], self.config(network)
        training = config.training.model_copy(update={"steps": steps})
        out = self.folder / f"{stage}-{time.monotonic_ns()}"
        needs = {"autoencoder": self.checkpoint("autoencoder")} if stage == "diffusion" else {}
        train = train_segmenter if stage == "segmenter" else METHODS.trainings[stage].train
        with overheard() as bars:
            config = config.model_copy(update={"training": training})
            train(self.cohort, config, out, size_px=self.size_px, seed=0, **needs)
        return bars.seconds(steps)[1]

    def checkpoint(self, stage: str) -> Path:
        """Return the folder of the last training of a stage."""
        return max(self.folder.glob(f"{stage}-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))

    def for_some_seconds(self, network: str) -> float:
        """Train for the time that is asked for, after some steps to warm up."""
        each = self.train(network, WARM_STEPS)
        return self.train(network, steps_of(self.bench.arguments.seconds, each))

    def train_all(self) -> None:
        """Train every network, by us and plainly."""
        for network in NETWORKS:
            if getattr(self.config(network), "kind", "") == "linear":  # a first stage that is computed, not trained
                self.train(network, FEWEST_STEPS)
                continue
            batch = self.config(network).training.batch_size
            ours, plain = (self.row("training", network, variant, batch) for variant in ("counterstain", "plain fp32"))
            self.bench.do(ours, lambda row, network=network: self.training_row(row, network))
            self.bench.do(plain, lambda row, network=network: self.plain_row(row, network))
            if ours.seconds_a_step and plain.seconds_a_step:
                ours.ratio, plain.ratio = plain.seconds_a_step / ours.seconds_a_step, 1.0

    def training_row(self, row: Row, network: str) -> None:
        """Time our training, then the same without waiting for data."""
        row.seconds_a_step = self.for_some_seconds(network)
        row.images_a_second = row.batch / row.seconds_a_step
        with same_batches():
            row.waiting = max(0.0, 1 - self.for_some_seconds(network) / row.seconds_a_step)

    def plain_row(self, row: Row, network: str) -> None:
        """Time plain code."""
        step = self.plain_denoiser() if network == "denoiser" else self.plain_network(network)
        with plain_arithmetic():
            each = min(timed(step) for _ in range(WARM_STEPS))
            steps = steps_of(self.bench.arguments.seconds, each)
            row.seconds_a_step = timed(lambda: [step() for _ in range(steps)]) / steps
        row.images_a_second = row.batch / row.seconds_a_step

    def plain_denoiser(self) -> Callable[[], object]:
        """Return a step of diffusers' usual training script."""
        training = self.config("denoiser").training
        model = DiffusionGenerator.load(self.checkpoint("diffusion")).model.train()
        module = PlainDiffusion(model).to(choose_device())
        patches = PlainPatches(self.sampler("denoiser"), 10**9, training.batch_size, Turns(["plain"], 10**9))
        batches = iter(DataLoader(patches, training.batch_size))
        optimizer = module.configure_optimizers()["optimizer"]

        def step() -> None:
            loss = module.training_step([part.to(module.device) for part in next(batches)], 0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.unet.parameters(), training.gradient_clip or 1.0)
            optimizer.step()
            module.on_train_batch_end()

        return step

    def plain_network(self, network: str) -> Callable[[], object]:
        """Return a step with the losses of a network in a plain loop."""
        config, labels = self.config(network), self.cohort.taxonomy.num_labels
        makers: dict[str, Callable[[], Trainable]] = {
            "SPADE": lambda: Spade(config.at(self.cohort.mpp), labels, self.size_px, 0),
            "first stage": lambda: Autoencoder(config, self.size_px, 0),
            "segmenter": lambda: Segmenter(config, steps=config.training.steps),
        }
        model = makers[network]().to(choose_device())
        batches, optimizers = PatchBatches(self.sampler(network), config.training.batch_size), model.optimizers()
        position, numbers = torch.arange(config.training.batch_size), iter(range(10**9))

        def minimise(loss: Tensor, number: int = 0) -> None:
            optimizers[number].zero_grad()
            loss.backward()
            optimizers[number].step()

        def step() -> None:
            number = next(numbers)
            batch = batches(number) | {"step": torch.tensor(number), "position": position}
            losses = model.training_step({name: value.to(model.device) for name, value in batch.items()}, minimise)
            float(next(iter(losses.values())))

        return step

    def draw_all(self) -> None:
        """Draw with every sampler."""
        tiny = self.bench.arguments.tiny
        count, slow_steps = (2, 4) if tiny else (16, 200)
        patches = [self.sampler("denoiser")[i] for i in range(count)]
        guidance = self.recipe.diffusion.sampler.guidance
        fast = {"name": "dpmsolver++", "steps": 2 if tiny else 16, "guidance": 1.0}
        variants: dict[str, dict[str, Any]] = {
            f"DDIM {slow_steps}": {"name": "ddim", "steps": slow_steps, "eta": 1.0, "guidance": 1.0},
            f"DPM-Solver++ {fast['steps']}": fast,
            **({f"the same, guidance {guidance:g}": fast | {"guidance": guidance}} if guidance != 1.0 else {}),
            "few-step 4": fast | {"steps": 4},
        }
        plain = self.row("drawing", "denoiser", f"plain DDIM {slow_steps}, fp32", count)
        self.bench.do(plain, lambda row: self.drawing_row(row, self.plain_drawing(patches, slow_steps), plain=True))
        for variant, sampler in variants.items():
            drawing = {"sampler": sampler | {"compute_batch": count}}
            row = self.row("drawing", "denoiser", variant, count)
            self.bench.do(row, lambda row, d=drawing: self.drawing_row(row, self.drawing("diffusion", patches, d)))
        row = self.row("drawing", "SPADE", "one pass", count)
        self.bench.do(row, lambda row: self.drawing_row(row, self.drawing("spade", patches, {})))
        for row in self.bench.rows:
            same = (row.part, row.preset, row.size_px) == ("drawing", self.name, self.size_px)
            if same and row.images_a_second and plain.images_a_second:
                row.ratio = row.images_a_second / plain.images_a_second

    def drawing(self, method: str, patches: list[Patch], settings: dict[str, Any]) -> Callable[[], object]:
        """Return what draws patches with the checkpoint of the last training."""
        generator = load_generator(method, self.checkpoint(str(METHODS[method].kind)), self.cohort, settings)
        requests = [DrawRequest.of(patch, i, patch.instances > 0) for i, patch in enumerate(patches)]
        return lambda: generator.draw(requests)

    def drawing_row(self, row: Row, draw: Callable[[], object], *, plain: bool = False) -> None:
        """Draw once to warm up, then until the time is over."""
        with plain_arithmetic() if plain else nullcontext():
            times = [timed(draw)]
            while len(times) < 2 or sum(times[1:]) < self.bench.arguments.seconds / 2:
                times.append(timed(draw))
        row.images_a_second = row.batch / pd.Series(times[1:]).median()

    def plain_drawing(self, patches: list[Patch], steps: int) -> Callable[[], object]:
        """Return diffusers' usual loop."""
        model = DiffusionGenerator.load(self.checkpoint("diffusion")).model
        labels = torch.stack([torch.from_numpy(patch.label_mask).long() for patch in patches]).to(model.device)
        onehot = torch.nn.functional.one_hot(labels, model.num_labels).permute(0, 3, 1, 2).float()
        condition = torch.nn.functional.interpolate(onehot, scale_factor=1 / model.factor, mode="area")
        scheduler = DDIMScheduler(**model.config.noise.scheduler_settings())
        channels = model.first_stage.config.latent_channels

        @torch.no_grad()
        def draw() -> object:
            scheduler.set_timesteps(steps)
            latents = torch.randn(len(patches), channels, *condition.shape[2:], device=model.device)
            for t in scheduler.timesteps:
                predicted = model.unet(torch.cat([latents, condition], dim=1), t).sample
                latents = scheduler.step(predicted, t, latents, eta=1.0).prev_sample
            mean, sd = (part[:, None, None] for part in (model.latent_mean, model.latent_sd))
            return to_images(model.first_stage.decode(latents * sd + mean))

        return draw


@contextmanager
def same_batches() -> Iterator[None]:
    """Give the first batch of patches again and again."""
    read, kept = PatchBatches.part, dict[tuple[int, int, int], dict[str, Tensor]]()

    def part(self: PatchBatches, step: int, start: int, stop: int) -> dict[str, Tensor]:
        place = id(self), start, stop
        if place not in kept:
            kept[place] = read(self, step, start, stop)
        return kept[place]

    PatchBatches.part = part  # type: ignore[method-assign]
    try:
        yield
    finally:
        PatchBatches.part = read  # type: ignore[method-assign]


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Switch off TF32 and autotuning, whatever the trainings before have switched on."""
    backends: Any = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = backends.cudnn.benchmark = False
    try:
        yield
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = before


def steps_of(seconds: float, each: float) -> int:
    return max(FEWEST_STEPS, round(seconds / each))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of some work, with all that was asked of the GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def summary(row: Row) -> str:
    figures = {
        f"{row.seconds_a_step or 0:.3f} s a step": row.seconds_a_step,
        f"{row.images_a_second or 0:.2f} images a second": row.images_a_second,
        f"{row.peak_gib or 0:.1f} GiB": row.peak_gib,
        f"{row.waiting or 0:.0%} waiting": row.waiting is not None,
        row.note: row.note,
    }
    known = ", ".join(text for text, value in figures.items() if value)
    return f"{row.part}: {row.preset} {row.size_px} px, {row.network}, {row.variant}: {known}"


def write(rows: list[Row], out: Path) -> None:
    """Write the table as CSV and Markdown."""
    table = pd.DataFrame([dataclasses.asdict(row) for row in rows])
    table.to_csv(out / "gpu.csv", index=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    formats = {"waiting": "{:.0%}", "peak_gib": "{:.1f}", "images_a_second": "{:.3g}", "seconds_a_step": "{:.3g}"}
    formats["ratio"] = "{:.2f}"
    lines = [f"{device}, torch {torch.__version__}, Python {platform.python_version()}", ""]
    lines += [f"| {' | '.join(name.replace('_', ' ') for name in table)} |", "|" + "---|" * len(table.columns)]
    for row in table.to_dict("records"):
        cells = ("" if pd.isna(value) else formats.get(str(name), "{}").format(value) for name, value in row.items())
        lines.append(f"| {' | '.join(cells)} |")
    (out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the tables")
    parser.add_argument("--presets", nargs="+", default=["paper", "best"])
    parser.add_argument("--sizes", nargs="+", type=int, help="edges of the patches [default: 512 256, tiny: 64 32]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each training, beside its first steps")
    parser.add_argument("--tiny", action="store_true", help="networks and patches small enough for any CPU")
    arguments = parser.parse_args(words)
    arguments.sizes = arguments.sizes or ([64, 32] if arguments.tiny else [512, 256])
    arguments.seconds = 0.01 if arguments.tiny else arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench = Bench(arguments, Path(temporary))
        for size_px in arguments.sizes:
            for name in arguments.presets:
                preset = Preset(bench, name, size_px)
                preset.train_all()
                preset.draw_all()
                write(bench.rows, arguments.out)
    print((arguments.out / "gpu.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
