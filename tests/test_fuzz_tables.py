"""Tables, masks, labels and taxonomies as strangers save them: right, or refused in one line.

COUNTERSTAIN_FUZZ sets how many are tried over all kinds (120 by default, 400 or more before a release).
"""

import os

import pytest
from drawn_tables import KINDS, try_input

TRIALS = int(os.environ.get("COUNTERSTAIN_FUZZ", "120"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_is_read_as_it_was_meant_or_refused_in_one_line(tmp_path, kind):
    count = max(4, TRIALS // len(KINDS))
    refused = [try_input(kind, seed, tmp_path / str(seed)) is not None for seed in range(count)]
    assert any(refused)
