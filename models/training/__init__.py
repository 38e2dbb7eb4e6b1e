"""How models/shapes was trained, one stage a file; `python -m models.train_shapes` runs them."""
