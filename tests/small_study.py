"""The smallest study of 5 arms x 2 repeats, for tests that run it more than once."""

import yaml

SMALL = {
    "name": "small",
    "preset": "demo",
    "cohort": {
        "phantom": {"slides": 6, "regions_per_slide": 1, "size_px": 64},
        "split": {"train": 2, "val": 2, "test": 2},
    },
    "methods": ["spade"],
    "amounts": [0.5, 1.0, 2.0],
    "repeats": 2,
    "resources": {"threads": 1, "synthesis_shards": 1},
    "recipe": {
        "size_px": 32,
        "spade": {
            "training": {"steps": 2, "batch_size": 2},
            "generator_width": 4,
            "discriminator_width": 4,
            "hidden": 4,
            "compute_batch": 64,
        },
        "segmenter": {
            "training": {"steps": 2, "batch_size": 2},
            "encoder": "tu-test_resnet",
            "inference": {"window_px": 64},
            "mixing": {"epoch_patches": 64},
        },
    },
}


FOLDS = {  # two arms in two folds
    "cohort": {"phantom": SMALL["cohort"]["phantom"], "folds": 2},
    "baselines": ["subtype"],
    "amounts": [2.0],
}


def small_study(folder, **changes):
    """Write the study's file."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes))
    return file
