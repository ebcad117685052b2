"""Clips to a batch."""
import torch


def collate(clips, pin_memory):
    """A batch of clips, with tensors stacked.

    pin_memory: in page-locked memory, from which a GPU copies while the next step is prepared."""
    batch = {}
    for key in clips[0]:
        values = [torch.as_tensor(clip[key]) for clip in clips]
        shape = (len(values), *values[0].shape)
        whole = torch.empty(shape, dtype=values[0].dtype, pin_memory=pin_memory)
        batch[key] = torch.stack(values, out=whole)
    return batch
