"""Soft prompts as token ids: where they enter a model, and how a call and its result are changed for them."""
