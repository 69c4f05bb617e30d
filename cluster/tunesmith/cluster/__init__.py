"""The ground: recipes and errors, storage and artifacts, the Ray session and the command line."""
