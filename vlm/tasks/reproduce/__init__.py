"""Papers' ablations in miniature: grids of runs, resumable, ending in a table with intervals."""
