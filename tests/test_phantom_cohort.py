from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.errors import MismatchError

SMALL = PhantomConfig(slides=3, regions_per_slide=2, size_px=48)


def test_a_cohort_resumed_after_a_kill_equals_an_uninterrupted_one(tmp_path):
    whole = write_phantom(SMALL, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write_phantom(SMALL, tmp_path / "resumed", Mock(side_effect=[None, KeyboardInterrupt]))
    resumed = write_phantom(SMALL, tmp_path / "resumed")
    pd.testing.assert_frame_equal(whole.regions, resumed.regions)
    pd.testing.assert_frame_equal(whole.instances, resumed.instances)
    for position in range(len(whole)):
        for one, other in zip(whole.read(position), resumed.read(position), strict=True):
            assert np.array_equal(one, other)


def test_a_larger_cohort_begins_with_the_slides_of_a_smaller_one(tmp_path):
    small = write_phantom(SMALL.model_copy(update={"slides": 1}), tmp_path / "small")
    large = write_phantom(SMALL, tmp_path / "large")
    assert np.array_equal(small.read(0)[0], large.read(0)[0])


def test_progress_is_called_for_every_slide_also_when_all_is_done(tmp_path):
    progress = Mock()
    for _ in range(2):
        cohort = write_phantom(SMALL, tmp_path / "cohort", progress)
    assert progress.call_count == len(cohort) == 6


def test_a_folder_of_another_phantom_is_left_alone(tmp_path):
    write_phantom(SMALL, tmp_path)
    with pytest.raises(MismatchError, match=r"belongs to another run \(cohort: source.config.seed was 0, now 1\)"):
        write_phantom(SMALL.model_copy(update={"seed": 1}), tmp_path)


def test_the_command_says_what_it_made_and_what_comes_next_and_refuses_values_out_of_range(tmp_path, run):
    status, _, errors = run("phantom", tmp_path / "p", "--slides", 0)
    assert (status, "slides" in errors, (tmp_path / "p").exists()) == (2, True, False)
    status, out, _ = run("phantom", tmp_path / "p", "--slides", 1, "--regions", 1, "--size-px", 48, "--set", "purity=1")
    assert status == 0
    assert "1 slides, 1 regions of 48 px at 1 mpp" in out
    assert "counterstain split" in out
