import subprocess
import sys

import pytest

from counterstain.seeding import derive, numpy_generator, torch_generator


def test_derived_seeds_never_change_between_versions():
    assert derive(0) == 4761921975702974394
    assert derive(0, "patch", 7) == 5766305853157369814
    assert numpy_generator(1, "a").integers(2**32) == 3840814416


def test_derived_seeds_are_the_same_in_every_process():
    command = "from counterstain.seeding import derive; print(derive(3, 'x', 4))"
    environment = {"PYTHONHASHSEED": "77"}
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, check=True, env=environment)
    assert int(printed.stdout) == derive(3, "x", 4)


@pytest.mark.parametrize("keys", [("patch", 8), ("patc", 7), ("patch", "7"), (7, "patch"), ("patch",), ("patch", 7, 0)])
def test_other_keys_give_other_seeds(keys):
    assert derive(0, *keys) != derive(0, "patch", 7)


def test_seeds_fit_torch():
    assert all(0 <= derive(seed, "k") < 2**63 for seed in range(200))
    torch_generator(2**62, "k")


def test_torch_generators_depend_on_their_keys():
    import torch

    drawn = [torch.randn(3, generator=torch_generator(0, "noise", i)) for i in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
