"""Tables of foreign tensor names, one for each family, used in both directions."""
