"""Weights: key maps, conversion both ways, safe reading, load and save."""
