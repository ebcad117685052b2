"""Clips to a batch."""
import torch


def collate(clips):
    """A batch of clips, with tensors stacked."""
    return {key: torch.stack([torch.as_tensor(clip[key]) for clip in clips]) for key in clips[0]}


def pinned(batch):
    """The batch in page-locked memory, from which a GPU copies while the next step is prepared."""
    return {key: values.pin_memory() for key, values in batch.items()}
