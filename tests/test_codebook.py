import math

import pytest
import torch

from counterstain.generators.autoencoder import CodebookUpkeep, usage_of

CENTRES = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])


def latents(step):
    """Four clouds of latents, (1, 2, 8, 8)."""
    generator = torch.Generator().manual_seed(step)
    clouds = CENTRES.repeat(16, 1) + 0.1 * torch.randn(64, 2, generator=generator)
    return clouds.T.reshape(1, 2, 8, 8)


def run(codes, steps, **settings):
    upkeep, revived = CodebookUpkeep(codes, 0.9, **settings), 0
    for step in range(steps):
        drawn = latents(step)
        chosen = torch.cdist(drawn.movedim(1, -1).flatten(0, -2), codes).argmin(1)
        revived += upkeep.update(codes, drawn, chosen, torch.Generator().manual_seed(step))
    return upkeep, revived


def test_averaged_codes_go_to_the_means_of_the_latents_that_choose_them():
    codes = CENTRES + torch.tensor([1.0, -1.0])
    upkeep, _ = run(codes, 100, averaged=True, revive_below=None)
    assert torch.allclose(codes, CENTRES, atol=0.1)
    assert torch.allclose(upkeep.usage, torch.ones(4), atol=1e-4)


def test_codes_without_upkeep_collapse_and_revived_ones_find_every_cloud():
    far = torch.tensor([[2.0, 2.0], [90.0, 0.0], [0.0, 90.0], [90.0, 90.0]])
    collapsed, revived = far.clone(), far.clone()
    run(collapsed, 100, averaged=True, revive_below=None)
    assert torch.equal(collapsed[0].round(decimals=1), torch.tensor([2.5, 2.5]))
    _, times = run(revived, 300, averaged=True, revive_below=0.1)
    assert times >= 3
    assert torch.cdist(CENTRES, revived).min(1).values.max() < 0.5


def test_the_usage_is_known_where_codes_follow_the_gradient():
    codes = torch.cat([CENTRES, torch.full((4, 2), 99.0)])
    before = codes.clone()
    upkeep, revived = run(codes, 60, averaged=False, revive_below=None)
    assert revived == 0
    assert torch.equal(codes, before)
    assert upkeep.usage[:4].tolist() == pytest.approx([2.0] * 4, abs=0.01)
    assert upkeep.usage[4:].max() < 0.01


def test_perplexity_is_the_number_of_codes_that_would_do():
    assert usage_of(torch.arange(8), 16) == (0.5, pytest.approx(8.0))
    share, perplexity = usage_of(torch.tensor([0, 0, 0, 1]), 16)
    assert share == 2 / 16
    assert perplexity == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
