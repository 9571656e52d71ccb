"""Pure functions of tensors: every objective of the lineage, with no state, no rank and no file."""
