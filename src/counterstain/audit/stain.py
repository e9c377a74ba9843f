"""Stain and seams of instances, measured in the image itself, without a network.

Shapes: H, W = rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

import numpy as np
import pandas as pd

from counterstain.audit.redrawn import REAL, redrawn_pixels
from counterstain.data.patches import Patch
from counterstain.audit.redrawn import REAL, redrawn_pixels
from counterstain.data.patches import Patch
from counterstain.data.stains import STAIN_VECTORS
from counterstain.taxonomy import BACKGROUND
