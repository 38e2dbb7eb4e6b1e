"""Stages of the training of models/shapes, one a file; adapters/ trains what changes it."""
