"""The small text-to-image model that ships with the project, and the script that trained it."""
