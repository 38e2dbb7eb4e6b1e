"""Stages of the training of models/shapes-edges and models/shapes-red-chalk, one a file."""
