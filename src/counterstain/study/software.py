"""What a cell was made with: versions of packages, and the device."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("counterstain", "torch", "lightning", "diffusers", "segmentation-models-pytorch", "numpy", "zarr")


def software() -> dict[str, Any]:
    """Return the versions of this process and its device."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"versions": versions, "device": device}


def merged(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what several cells were made with; where they differ, all of it."""
    versions: dict[str, dict[str, None]] = {}
    devices: dict[str, None] = {}
    for record in records:
        devices[record["device"]] = None
        for package, number in record["versions"].items():
            versions.setdefault(package, {})[number] = None
    return {
        "versions": {package: " and ".join(sorted(numbers)) for package, numbers in versions.items()},
        "device": " and ".join(sorted(devices)),
    }
