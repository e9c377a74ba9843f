"""Batch normalisation whose statistics are those of the whole batch, over all processes of a training.

torch's ``SyncBatchNorm`` works on GPUs alone; on CPUs :class:`SyncedBatchNorm2d` does the same by sums over processes.
"""

from __future__ import annotations

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from torch import Tensor, nn

from counterstain.processes import summed


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation of (B, C, H, W) with mean and variance over the batches of all processes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # torch's name
        """Normalise; outside of training with the running statistics, as ever."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        pixels = summed(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = summed(x.sum((0, 2, 3))) / pixels
        centred = x - mean[:, None, None]
        variance = summed(centred.square().sum((0, 2, 3))) / pixels
        self._remember(mean.detach(), variance.detach() * pixels / (pixels - 1))
        y = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _SyncOnCpu(LayerSync):
    """Lightning's plugin that swaps the layers' class and leaves their weights and names as they are."""

    def apply(self, model: nn.Module) -> nn.Module:
        return _with_class(model, nn.BatchNorm2d, SyncedBatchNorm2d)

    def revert(self, model: nn.Module) -> nn.Module:
        return _with_class(model, SyncedBatchNorm2d, nn.BatchNorm2d)


def synchronisation(*, on_gpu: bool) -> LayerSync:
    """Return Lightning's plugin that makes batch normalisation see the batches of all processes."""
    return TorchSyncBatchNorm() if on_gpu else _SyncOnCpu()


def _with_class(model: nn.Module, found: type[nn.Module], wanted: type[nn.Module]) -> nn.Module:
    for layer in model.modules():
        if type(layer) is found:
            layer.__class__ = wanted
    return model
