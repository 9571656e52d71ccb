"""One training engine for every stage."""
