"""Programs around the package: the command line."""
