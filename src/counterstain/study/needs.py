"""What the cells of a study need of a machine, looked for before the first of them runs for hours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from counterstain.recipe import Recipe
from counterstain.study.plan import Cell


def lacking(recipe: Recipe, cells: Iterable[Cell]) -> list[str]:
    """Return what the cells will not find on this machine, a line for each package and file of weights.

    Parameters
    ----------
    recipe : Recipe
    cells : iterable of Cell
        Those that are to run.
    """
    stages = {cell.stage for cell in cells}
    lines = [
        f"{key}: {path}: no such file"
        for key, path in _files(recipe)
        if key.split(".")[0] in stages and not path.is_file()
    ]
    if "autoencoder" in stages and recipe.autoencoder.lpips_weight and find_spec("lpips") is None:
        lines.append(
            "autoencoder.lpips_weight is above 0, but lpips is not installed: pip install 'counterstain[lpips]', "
            "or --set recipe.autoencoder.lpips_weight=0"
        )
    return lines


def _files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    weights = {
        "spade.vgg_weights": recipe.spade.vgg_weights if recipe.spade.vgg_weight else None,
        "autoencoder.lpips_weights": recipe.autoencoder.lpips_weights if recipe.autoencoder.lpips_weight else None,
        "segmenter.encoder_weights": recipe.segmenter.encoder_weights,
    }
    for key, given in weights.items():
        if given not in {None, "imagenet"}:
            yield key, Path(str(given))
