"""Decoding: sessions, caches, and the engine's routes."""
