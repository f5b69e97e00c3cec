"""Weights from a hub, a folder, a GGUF file, a package or a seed."""
