"""What this machine has: versions, device, pre-trained weights."""

from __future__ import annotations

from counterstain.cli.terminal import print_table

PACKAGES = (
    "counterstain", "torch", "torchvision", "lightning", "diffusers", "segmentation-models-pytorch", "zarr",
    "openslide-python", "tifffile", "shapely", "lpips",
)  # fmt: skip


def doctor() -> None:
    """Say which versions, which device and which pre-trained weights this machine has."""
    rows = (*_versions(), *_machine(), *_weights())
    print_table(("", "found", "means"), rows, title="counterstain doctor", words=3)


def _versions() -> list[tuple[str, str, str]]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = [("python", platform.python_version(), "")]
    for package in PACKAGES:
        try:
            rows.append((package, version(package), ""))
        except PackageNotFoundError:
            rows.append((package, "not installed", "optional: perceptual loss of the autoencoder"))
    return rows


def _machine() -> list[tuple[str, str, str]]:
    import os
    import shutil
    from pathlib import Path

    import torch

    rows = [("CPU cores", str(os.cpu_count()), f"torch computes on {torch.get_num_threads()} of them")]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        rows.append(("GPU", f"{torch.cuda.get_device_name()}, {memory:.0f} GB", "precision auto = bf16"))
    else:
        fast = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public name for it
        rows.append(("GPU", "none", f"precision auto = {'bf16' if fast else 'fp32'} on this CPU; use --preset demo"))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    rows.append(("disk", f"{free:.0f} GB free here", "" if free > 10 else "little room for a study"))
    return rows


def _weights() -> list[tuple[str, str, str]]:
    from pathlib import Path

    import torch

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    rows = []
    for network, pattern, used, remedy in (
        ("VGG19, ImageNet", "vgg19-*.pth", "perceptual loss of SPADE", "spade.vgg_weights=FILE or spade.vgg_weight=0"),
        (
            "VGG16, ImageNet",
            "vgg16-*.pth",
            "perceptual loss (LPIPS) of the autoencoder",
            "autoencoder.lpips_weights=FILE or autoencoder.lpips_weight=0",
        ),
        ("ResNet-34, ImageNet", "resnet34-*.pth", "start of the segmenter", "segmenter.encoder_weights=FILE or null"),
    ):
        found = sorted(file.name for file in cache.glob(pattern))
        otherwise = "" if found else f": fetched on first use; without a network --set {remedy}"
        rows.append((network, found[0] if found else "not in the cache", f"{used}{otherwise}"))
    return rows
