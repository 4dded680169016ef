"""Trimtab: train large Transformers through small updates."""
