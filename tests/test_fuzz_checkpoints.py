"""Corrupted checkpoints, with hashes that fit as those of an attacker would: always a network or one line.

COUNTERSTAIN_FUZZ sets how many corruptions are tried (60 by default, 2,000 before a release).
"""

import copy
import json
import os
import random
import resource
import shutil
import struct
import time

import pytest
from drawn_cohort import HER2
from drawn_requests import ONE, denoiser_config, first_stage_config

from counterstain.audit import JudgeConfig
from counterstain.audit.judge import Judge, load_judge
from counterstain.checkpoints import CheckpointHeader, save_checkpoint
from counterstain.errors import CounterstainError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.spade import Spade, SpadeGenerator
from counterstain.generators.spade_config import SpadeConfig
from counterstain.generators.train import load_autoencoder
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.storage import sha256_of, write_sealed

TRIALS = int(os.environ.get("COUNTERSTAIN_FUZZ", "60"))
SECONDS, MEMORY_KB = 10, 2**20
ODD = (
    -1, 0, 10**9, 10**30, 1e308, "", "x" * 5000, "imagenet", "tu-hf-hub:x/y", None, True, [], {}, [1] * 1000, {"a": {}},
    "../../etc", "\x1b[31m", [1, None],
)  # fmt: skip
DTYPES = ("F16", "BF16", "F64", "I8", "I32", "U8", "BOOL", "F8_E5M2", "C64")
TINY = {"encoder": "tu-test_resnet", "decoder_channels": (16, 16, 8, 8, 8)}
LOAD = {
    "spade": SpadeGenerator.load, "autoencoder": load_autoencoder, "diffusion": DiffusionGenerator.load,
    "segmenter": load_segmenter, "judge": load_judge,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    spade = SpadeConfig(training=ONE, generator_width=4, discriminator_width=4, hidden=8, latent=8, vgg_weight=0.0)
    stage, denoiser = first_stage_config(kind="vq", codebook_size=16), denoiser_config(context_share=0.5)
    segmenter, judge = SegmenterConfig(encoder_weights=None, **TINY), JudgeConfig(**TINY)
    first = Autoencoder(stage, 32)
    inner = {f"first_stage.{name}": tensor for name, tensor in first.state_dict().items()}
    made = {
        "spade": (spade, Spade(spade, 6, 32).state_dict(), {}),
        "autoencoder": (stage, first.state_dict(), {}),
        "diffusion": (
            denoiser,
            Diffusion(denoiser, first, 6).state_dict() | inner,
            {"first_stage": stage.model_dump()},
        ),
        "segmenter": (segmenter, Segmenter(segmenter).state_dict(), {}),
        "judge": (judge, Judge(judge, 6).state_dict(), {}),
    }
    for kind, (config, state, notes) in made.items():
        header = CheckpointHeader(
            kind=kind, taxonomy=HER2, size_px=32, mpp=0.5, config=config.model_dump(mode="json"), seed=0,
            patients_seen=("p0",), cohort="c", notes=notes,
        )  # fmt: skip
        save_checkpoint(folder / kind, state, header)
    return folder


def places(content):
    """Every mapping or list in JSON with each of its keys."""
    keys = content.keys() if isinstance(content, dict) else range(len(content) if isinstance(content, list) else 0)
    return [(content, key) for key in keys] + [place for key in keys for place in places(content[key])]


def change(content, rng):
    """Change, multiply or leave out a value somewhere."""
    inside, key = rng.choice(places(content))
    if rng.random() < 0.15:
        del inside[key]
    elif rng.random() < 0.3 and type(inside[key]) in {int, float}:
        inside[key] *= rng.choice([-1, 3, 1000, 0.5])
    else:
        inside[key] = copy.deepcopy(rng.choice(ODD))


def corrupt(folder, rng):
    header, weights = folder / "model.json", folder / "model.safetensors"
    known, stored = json.loads(header.read_text()), bytearray(weights.read_bytes())
    known.pop("checksum", None)
    how = rng.choice(["header", "header", "bytes of the header", "tensors", "bytes of the weights", "dtype"])
    if how == "header":
        change(known, rng)
    elif how == "bytes of the weights":
        stored[rng.randrange(2000)] = rng.randrange(256)
        stored = stored[: rng.choice([len(stored), rng.randrange(len(stored))])]
    elif how != "bytes of the header":
        size = struct.unpack("<Q", stored[:8])[0]
        tensors = json.loads(stored[8 : 8 + size])
        if how == "tensors":
            change(tensors, rng)
        else:
            rng.choice(list(tensors.values()))["dtype"] = rng.choice(DTYPES)
        text = json.dumps(tensors).encode()
        stored[: 8 + size] = struct.pack("<Q", len(text)) + text
    weights.write_bytes(stored)
    write_sealed(header, known | {"sha256": sha256_of(weights)})
    if how == "bytes of the header":
        text = bytearray(header.read_bytes())
        text[rng.randrange(len(text))] = rng.randrange(256)
        header.write_bytes(text)


@pytest.mark.parametrize("kind", LOAD)
def test_a_corrupted_checkpoint_is_a_network_or_one_line_in_time_and_little_memory(checkpoints, tmp_path, kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(-(-TRIALS // len(LOAD))):
        folder = shutil.copytree(checkpoints / kind, tmp_path / str(trial))
        corrupt(folder, random.Random(f"{kind} {trial}"))
        begun = time.process_time()
        message = ""
        try:
            LOAD[kind](folder)
        except CounterstainError as refusal:
            message = str(refusal)
        assert "\n" not in message, trial
        assert len(message) < 1500, trial
        assert time.process_time() - begun < SECONDS, trial
        shutil.rmtree(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KB
