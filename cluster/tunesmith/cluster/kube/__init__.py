"""Kubernetes documents: written from a recipe or a serving configuration, and checked before a cluster sees them."""
