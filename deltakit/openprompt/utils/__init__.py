"""OpenPrompt's helpers."""
