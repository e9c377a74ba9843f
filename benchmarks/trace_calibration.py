"""Print how often a trace of synthetic sets raises false alarms, and how often it finds what it should find.

    python benchmarks/trace_calibration.py OUT [false-alarms] [planted] [generators]

Phantoms are small (16 patients, a region of 128 px each, patches of 48 px); their patients are dealt anew into 8
training and 8 held-out ones for every case, which is a line in OUT/PART.jsonl: what is there is not done again.

* ``false-alarms``: sets of the oracle, which draws tissue of its own; and for membership a denoiser that saw none of
  the patients.
* ``planted``: half of a set of the oracle is replaced by training tissue, changed in seven ways.
* ``generators``: a denoiser that learnt eight small patches by heart, and one that learnt from whole regions.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

import counterstain
from counterstain.audit.trace import membership, patient_losses, trace_set
from counterstain.audit.trace_result import ALPHA
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet, PatchSetHeader, PatchSetWriter, SyntheticPatch
from counterstain.data.patches import Patch, turn
from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.sampling import SamplingConfig
from counterstain.data.split import SplitConfig, link_cohort, split_cohort
from counterstain.data.stains import jitter_stains
from counterstain.generators.interface import DenoisingGenerator, load_generator
from counterstain.seeding import numpy_generator
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.synthesize import synthesize

SEEDS = (0, 100, 300)  # of phantoms
PATIENTS, TRAIN, REGION_PX, SIZE_PX, COUNT = 16, 8, 128, 48, 48
CASES = 120
DENOISER = {
    "size_px": SIZE_PX,
    "autoencoder": {"kind": "linear", "factor": 2, "latent_channels": 12},
    "diffusion": {
        "training": {"steps": 1500, "batch_size": 8},
        "channels": 32, "multipliers": [1, 2, 2], "blocks": 1, "noise": {"prediction": "v_prediction"},
        "normalise_latents": "all", "lr": 1e-3, "warmup_steps": 50, "lr_schedule": "cosine", "ema_decay": 0.99,
        "sampler": {"steps": 16},
    },
}  # fmt: skip
BY_HEART = {
    "sampling": {"flip": False, "quarter_turns": False, "background_share": 0.0},
    "training": {"steps": 2500, "batch_size": 8},
}


def phantom(out: Path, seed: int, size_px: int = REGION_PX, case: int = 0) -> Cohort:
    """Return a phantom whose patients are dealt out by the number of a case."""
    folder = out / f"phantom-{seed}-{size_px}"
    config = PhantomConfig(slides=PATIENTS, regions_per_slide=1, size_px=size_px, seed=seed)
    whole = Cohort.open(folder) if (folder / "cohort.json").exists() else write_phantom(config, folder)
    dealt = out / "splits" / f"{seed}-{size_px}-{case}"
    linked = Cohort.open(dealt) if (dealt / "cohort.json").exists() else link_cohort(whole, dealt)
    held = (PATIENTS - TRAIN) // 2
    return split_cohort(linked, SplitConfig(train=TRAIN, val=held, test=held, seed=case), force=True)[0]


def oracle_set(out: Path, cohort: Cohort, case: int) -> PatchSet:
    """Draw a set by the phantom's own renderer."""
    generator = load_generator("oracle", None, cohort)
    options: Any = {"count": COUNT, "size_px": SIZE_PX, "seed": case}
    found = synthesize(generator, cohort, out / "sets" / f"{cohort.folder.name}", SynthesisConfig(), **options)
    assert found is not None
    return found


def false_alarms(out: Path, case: int) -> dict[str, Any]:
    """Trace a set of the oracle."""
    cohort = phantom(out, SEEDS[case % len(SEEDS)], case=case)
    return p_values(trace_set(oracle_set(out, cohort, case), cohort, patches=COUNT, seed=case).tests)


def p_values(tests: pd.DataFrame) -> dict[str, Any]:
    """Return the p-value of every test, and whether they raise an alarm together."""
    return dict(zip(tests["test"], tests["p"], strict=True)) | {"any alarm": bool(tests["alarm"].any())}


# Planted copies: each takes a training patch, the oracle's image in its place and a generator of random numbers.

Plant = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def recoloured(copy: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change the density of every channel, brightness and contrast."""
    jittered = jitter_stains(copy, "channels", 0.2, rng).astype(float)
    return np.clip(128 + rng.uniform(0.6, 1.2) * (jittered - 128) + rng.uniform(-20, 20), 0, 255).astype(np.uint8)


def redrawn(share: float) -> Plant:
    """Let the left share of the image be the oracle's."""

    def plant(copy: np.ndarray, drawn: np.ndarray, _: np.random.Generator) -> np.ndarray:
        border = round(share * SIZE_PX)
        return np.concatenate([drawn[:, :border], copy[:, border:]], axis=1)

    return plant


def blurred(copy: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Average over 3 x 3 pixels, and add noise."""
    padded = np.pad(copy.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    mean = sum(padded[y : y + SIZE_PX, x : x + SIZE_PX] for y in range(3) for x in range(3)) / 9
    return np.clip(mean + rng.normal(0, 4, copy.shape), 0, 255).astype(np.uint8)


KINDS: dict[str, Plant] = {
    "moved": lambda copy, *_: copy,
    "turned": lambda copy, _, rng: turn(copy, flipped=False, quarter_turns=int(rng.integers(1, 4))),
    "mirrored": lambda copy, _, rng: turn(copy, flipped=True, quarter_turns=int(rng.integers(4))),
    "recoloured": recoloured,
    "blurred": blurred,
    "a third redrawn": redrawn(1 / 3),
    "half redrawn": redrawn(1 / 2),
    "two thirds redrawn": redrawn(2 / 3),
}


def planted(out: Path, case: int) -> dict[str, Any]:
    """Return, for every kind, how many copies were planted, found, and traced to the right patient."""
    cohort = phantom(out, SEEDS[case % len(SEEDS)], case=case)
    found, rng = oracle_set(out, cohort, case), numpy_generator(case, "planted")
    kinds, positions = list(KINDS), cohort.positions("train")
    images, sources = {}, {}
    for number in range(0, COUNT, 2):  # the others stay the oracle's
        y, x = rng.integers(REGION_PX - SIZE_PX + 1, size=2).tolist()
        copied = cohort.patch(int(rng.choice(positions)), y, x, SIZE_PX)
        kind = kinds[number // 2 % len(kinds)]
        images[number] = KINDS[kind](copied.image, found[number].image, rng)
        sources[number] = kind, copied.source.patient
    traced = trace_set(rewritten(out, found, images), cohort, patches=COUNT, seed=case)
    table = traced.images.set_index("image")
    rows = {kind: [0, 0, 0] for kind in kinds} | {"not planted": [0, 0, 0]}
    for number in range(COUNT):
        kind, patient = sources.get(number, ("not planted", ""))
        called = bool(table.loc[number, "copy"])
        rows[kind][0] += 1
        rows[kind][1] += called
        rows[kind][2] += called and table.loc[number, "training_patient"] == patient
    return rows | {"any alarm": bool(traced.tests["alarm"].any())}


def rewritten(out: Path, found: PatchSet, images: dict[int, np.ndarray]) -> PatchSet:
    """Write a set with other images in some places."""
    header: PatchSetHeader = found.header
    writer = PatchSetWriter(out / "planted" / found.folder.name, header)
    if writer.missing_shards():
        patches: list[Patch] = [found[i] for i in range(len(found))]
        patches = [replace(p, image=images.get(i, p.image)) for i, p in enumerate(patches)]
        filled = [patches[i % COUNT] for i in writer.indices(0)]
        writer.write(
            0, [SyntheticPatch(index=i, patch=p, subtypes_before=p.subtypes, seed=i) for i, p in enumerate(filled)]
        )
    return writer.finish()


def generators(out: Path, case: int) -> dict[str, Any]:
    """Train a denoiser, draw with it and trace both: by heart on patches of the training's size, or on regions."""
    seed, by_heart = SEEDS[case % len(SEEDS)], case < len(SEEDS)
    cohort = phantom(out, seed, 56 if by_heart else 256, case=case)
    settings = DENOISER | {"synthesis": {"sampling": {"background_share": 0.0 if by_heart else 0.5}}}
    settings["autoencoder"] = settings["autoencoder"] | {"sampling": settings["synthesis"]["sampling"]}
    settings["diffusion"] = settings["diffusion"] | (BY_HEART if by_heart else {})
    config = out / f"denoiser-{by_heart}.yaml"
    config.write_text(json.dumps(settings))
    options: Any = {"preset": "demo", "config": config}
    first = counterstain.train("autoencoder", cohort, out=out / f"autoencoder-{case}", **options)
    trained = counterstain.train("diffusion", cohort, out=out / f"diffusion-{case}", autoencoder=first, **options)
    options |= {"method": "diffusion", "generator": trained, "count": COUNT}
    drawn = counterstain.synthesize(cohort, out=out / "sets" / f"diffusion-{case}", **options)
    traced = counterstain.trace(drawn, cohort=cohort, generator=trained, patches=COUNT)
    values = {row["test"]: [row["value"], row["p"], bool(row["alarm"])] for row in traced.tests.to_dict("records")}
    return {"generator": "by heart" if by_heart else "sound", "phantom": seed} | values


def membership_alarms(out: Path) -> list[float]:
    """Return p-values of membership for splits of patients whom the sound denoiser never saw."""
    generator = load_generator("diffusion", out / "diffusion-3", phantom(out, SEEDS[0], 256, case=3))
    assert isinstance(generator, DenoisingGenerator)
    losses = [
        patient_losses(generator, phantom(out, seed, 256), SIZE_PX, SamplingConfig(), seed=0) for seed in SEEDS[1:]
    ]
    values = []
    for case in range(CASES):
        of = losses[case % len(losses)]
        train = numpy_generator(case, "dealt").permutation(of.index)[:TRAIN]
        values.append(float(membership(of, train.tolist(), case)["p"]))
    return values


PARTS: dict[str, tuple[Callable[[Path, int], dict[str, Any]], int]] = {
    "false-alarms": (false_alarms, CASES),
    "planted": (planted, 30),
    "generators": (generators, 6),
}


def done(out: Path, part: str) -> list[dict[str, Any]]:
    """Do the cases of a part that are not done yet, and return them all."""
    work, cases = PARTS[part]
    file = out / f"{part}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {row["case"] for row in rows}
    for case in range(cases):
        if case not in known:
            rows.append({"case": case} | work(out, case))
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
    return rows


def main() -> None:
    """Do the parts that are named, all of them otherwise, and print their tables."""
    out, parts = Path(sys.argv[1]), sys.argv[2:] or list(PARTS)
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        rows = pd.DataFrame(done(out, part))
        print(f"\n{part}: {len(rows)} cases")
        if part == "false-alarms":
            for name in ("copies", "closeness", "re-identification"):
                print(f"  {name}, p < {ALPHA:g}: {share(int((rows[name] < ALPHA).sum()), len(rows))}")
            print(f"  any alarm: {share(int(rows['any alarm'].sum()), len(rows))}")
        elif part == "planted":
            for kind in (*KINDS, "not planted"):
                planted_, found, right = np.sum(rows[kind].tolist(), axis=0).tolist()
                print(f"  {kind}: found {share(found, planted_)}, of the right patient {right}")
            print(f"  sets with an alarm: {share(int(rows['any alarm'].sum()), len(rows))}")
        else:
            print(rows.drop(columns="case").to_string(index=False))
            values = np.array(membership_alarms(out))
            print(f"  membership of unseen patients, p < {ALPHA:g}: {share(int((values < ALPHA).sum()), len(values))}")


def share(found: int, of: int) -> str:
    """Write a share with its exact 95 % interval."""
    ends = stats.binomtest(found, of).proportion_ci(method="exact")
    return f"{found}/{of} = {found / of:.3f} ({ends.low:.3f} to {ends.high:.3f})"


if __name__ == "__main__":
    main()
