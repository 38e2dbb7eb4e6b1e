"""The world of the shapes model: scenes, captions, layouts and drawing, and what judges pictures of them."""
