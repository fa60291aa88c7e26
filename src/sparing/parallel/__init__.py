"""Several processes that train one model together, on `torch.distributed`: gloo on CPUs, NCCL on GPUs."""
