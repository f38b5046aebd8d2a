"""Verbalizers, one file each."""
