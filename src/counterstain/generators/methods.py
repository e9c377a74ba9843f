"""The names of the methods that draw images."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["spade", "diffusion", "inpainting", "oracle"]
METHODS: dict[str, Method] = {method: method for method in get_args(Method)}
