"""Small programs over the public API."""
