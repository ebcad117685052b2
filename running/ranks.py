"""The processes of torchrun: what they tell each other."""
import torch
import torch.distributed as dist


def gather_from_ranks(value):
    """[value of each rank], on all ranks; any object that pickle takes."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(value):
    """The sum of a scalar tensor over all ranks, as a number: waits for the GPU."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value.item()


def average_gradients(parameters, world_size):
    """Over all ranks, in one all-reduce a step: the adapters are small (25 MB)."""
    if world_size == 1:
        return
    # None: a target that no forward pass uses, such as extrinsics_encoder
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    means = (flat / world_size).split([grad.numel() for grad in grads])
    for grad, mean in zip(grads, means):
        grad.copy_(mean.view_as(grad))
