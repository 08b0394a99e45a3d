"""What a model keeps for its backward pass."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from scalegmn.engine.memory import kept_bytes


def bytes_kept(model, params):
    """Of intermediate results and inputs, for the networks' backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(params)
    size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    del output
    return size


def share_of_budget(model, params):
    """Of the bytes that a backward pass may keep, the share that `networks_at_once` networks take."""
    model.train()
    device = torch.device("cpu")
    of_one, of_all = bytes_kept(model, params[:1]), bytes_kept(model, params)
    per_network = (of_all - of_one) / (len(params) - 1)
    return (of_one + (model.networks_at_once(device) - 1) * per_network) / kept_bytes(device)
