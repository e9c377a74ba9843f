"""Rules that carry tensors between a published state dict and ours, in both directions.

A rule names one published tensor and the tensors of ours that hold the same numbers. State dicts are plain mappings of
names to tensors; nothing is read or written here.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from counterstain.errors import InputError, MismatchError
from counterstain.storage import replacing

State = Mapping[str, Tensor]
NAMED = 3  # tensors that a message names


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One published tensor, our tensors, and the way there and back."""

    published: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    """The published tensor -> ours."""
    join: Callable[[Sequence[Tensor]], Tensor]
    """Ours -> the published tensor."""


def same(published: str, ours: str) -> Rule:
    """Return the rule of a tensor that differs in nothing but its name."""
    return Rule(published=published, ours=(ours,), split=lambda tensor: [tensor], join=lambda parts: parts[0])


def layer(published: str, ours: str) -> list[Rule]:
    """Return the rules of a layer's weight and bias."""
    return [same(f"{published}.{name}", f"{ours}.{name}") for name in ("weight", "bias")]


def pointwise(published: str, ours: str, dimensions: int) -> list[Rule]:
    """Return the rules of a convolution of size 1, ``dimensions`` wide, that is a linear layer in ours."""
    kernel = (1,) * dimensions
    weight = Rule(
        published=f"{published}.weight",
        ours=(f"{ours}.weight",),
        split=lambda tensor: [tensor.flatten(1)],
        join=lambda parts: parts[0].reshape(*parts[0].shape, *kernel),
    )
    return [weight, same(f"{published}.bias", f"{ours}.bias")]


def fused_attention(published: str, ours: str, heads: int) -> list[Rule]:
    """Return the rules of one convolution that makes queries, keys and values, head by head: rows (head, 3, width)."""

    def split(tensor: Tensor) -> list[Tensor]:
        by_head = tensor.reshape(heads, 3, -1, *tensor.shape[1:2])  # the kernel of size 1 falls away
        return [part.flatten(0, 1) for part in by_head.unbind(1)]

    def join(parts: Sequence[Tensor]) -> Tensor:
        joined = torch.stack([part.reshape(heads, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 2)
        return joined[..., None] if joined.ndim == 2 else joined

    return [
        Rule(
            published=f"{published}.{name}",
            ours=tuple(f"{ours}.{part}.{name}" for part in ("to_q", "to_k", "to_v")),
            split=split,
            join=join,
        )
        for name in ("weight", "bias")
    ]


def present(rules: Iterable[Rule], ours: Iterable[str]) -> list[Rule]:
    """Keep the rules whose tensors a network of ours has: shortcuts and attention are not everywhere."""
    names = set(ours)
    return [rule for rule in rules if names.issuperset(rule.ours)]


def to_ours(rules: Sequence[Rule], published: State, expected: State, source: str) -> dict[str, Tensor]:
    """Turn a published state dict into ours.

    Parameters
    ----------
    rules : sequence of Rule
    published : mapping
    expected : mapping
        State dict of our network; its shapes are what is checked.
    source : str
        The file, as messages are to name it.

    Raises
    ------
    MismatchError
        A tensor is missing, is not part of the layout, or is of another size.
    """
    _require_names(published, {rule.published for rule in rules}, source)
    state: dict[str, Tensor] = {}
    for rule in rules:
        tensor = published[rule.published]
        wanted = rule.join([expected[name] for name in rule.ours]).shape
        if tensor.shape != wanted:
            raise MismatchError(
                f"{source}: {rule.published} is {tuple(tensor.shape)}, expected {tuple(wanted)}; "
                "it does not fit the other tensors or the taxonomy"
            )
        state.update(zip(rule.ours, rule.split(tensor), strict=True))
    _require_names(state, set(expected), source)
    return state


def to_published(rules: Sequence[Rule], ours: State, source: str) -> dict[str, Tensor]:
    """Turn a state dict of ours into a published one.

    Raises
    ------
    MismatchError
        It has parts that the published layout does not have.
    """
    _require_names(ours, {name for rule in rules for name in rule.ours}, source)
    return {rule.published: rule.join([ours[name] for name in rule.ours]) for rule in rules}


def shape_of(state: State, name: str, source: str) -> torch.Size:
    """Return the shape of a tensor.

    Raises
    ------
    MismatchError
        There is no such tensor.
    """
    if name not in state:
        raise MismatchError(f"{source}: has no {name}; it is not of the published layout")
    return state[name].shape


def without_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Return what lies under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def with_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Return a state dict with a prefix before every name."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _require_names(state: State, wanted: set[str], source: str) -> None:
    missing, unknown = sorted(wanted - set(state)), sorted(set(state) - wanted)
    if missing:
        raise MismatchError(f"{source}: lacks {_some(missing)}; it is not of the published layout, or not whole")
    if unknown:
        raise MismatchError(f"{source}: has {_some(unknown)}, which the networks of the published layout do not have")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# State dicts on disk: safetensors, or PyTorch's own format read without running code.


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict, or the one inside a training's checkpoint (under ``state_dict``).

    Raises
    ------
    InputError
        The file is missing, damaged, holds more than tensors, or no state dict.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except InputError:
        raise
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a file of weights, or damaged ({_first_line(error)})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: expected a state dict (names -> tensors), found {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{path}: expected a state dict (names -> tensors), found {type(value).__name__} at {name!r}"
            )
    return dict(content)


def write_state(path: Path, content: Mapping[str, Tensor | Mapping[str, Tensor]]) -> None:
    """Write a state dict, or one under ``state_dict``, in PyTorch's own format."""
    buffer = io.BytesIO()  # torch's own writer hides that a disk is full
    torch.save(dict(content), buffer)
    with replacing(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe is None:
            raise InputError(f"{path}: not a file of weights, or damaged") from error
        raise InputError(
            f"{path}: holds more than plain tensors ({unsafe[1]}), which could run code, so it is not opened; where it "
            "is trusted, save its state dict alone as safetensors and give that"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
