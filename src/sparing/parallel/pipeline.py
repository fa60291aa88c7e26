"""Pipelines: consecutive layers on different ranks, by `torch.distributed.pipelining`."""

from sparing.parallel.schedules import bubble as bubble
