"""Replicas of `nn.DataParallel` without GPUs: torch's own replicas, whose tensors are copies on the CPU."""

import sys
from unittest import mock

import torch
from torch import nn


class _Times(torch.autograd.Function):
    """A copy with other values, whose gradient goes to the original: so a forward shows which of both it has read."""

    @staticmethod
    def forward(ctx, factor, tensor):
        return tensor * factor

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


def replica_of(model, factor=1.0):
    """A replica of a model, whose parameters are as many times as large."""

    def copies(tensors, devices, detach=False):
        one = [tensor.clone() if detach else _Times.apply(factor, tensor) for tensor in tensors]
        return [one for _ in devices] if tensors else []

    module = sys.modules["torch.nn.parallel.replicate"]
    with (
        mock.patch.object(module, "_broadcast_coalesced_reshape", copies),
        mock.patch.object(module, "_get_device_index", lambda device, _: device),
    ):
        (replica,) = nn.parallel.replicate(model, [0])
    return replica
