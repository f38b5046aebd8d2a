"""Inputs that every tiny backbone takes, and what to compare of its result."""

import torch


def inputs(kind, model, *, padding="left"):
    """A batch of two with the first row padded at a side, or none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :2] = 0
    if padding == "right":
        mask[0, -2:] = 0
    pixels = torch.randn(2, 3, 12, 12, generator=generator).to(next(model.parameters()).dtype)
    if kind in ("vit", "deit", "beit"):
        return {"pixel_values": pixels}
    if kind == "clip":
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if kind == "whisper":
        features = torch.randn(2, 7, 22, generator=generator).to(pixels.dtype)
        return {"input_features": features, "decoder_input_ids": ids}
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]}
    return {"input_ids": ids, "attention_mask": mask}


def hidden(output):
    """Everything that a model computed, as one vector."""
    tensors = [value for value in output.values() if isinstance(value, torch.Tensor)]
    return torch.cat([tensor.flatten() for tensor in tensors])
