"""Mixtures of experts on a dense model."""
