"""Checkpoints: tensors in files, and the names they go by."""
