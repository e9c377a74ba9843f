"""Scripts of measurements run to their end."""

import gpu
import pandas as pd


def test_every_network_is_timed_on_a_cpu_at_a_tiny_size(tmp_path):
    gpu.main(["--tiny", "--sizes", "32", "--presets", "best", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "gpu.csv")
    assert table["note"].isna().all()
    assert (table["ratio"] > 0).all()
    assert set(table["network"]) == {"SPADE", "first stage", "denoiser", "segmenter"}
