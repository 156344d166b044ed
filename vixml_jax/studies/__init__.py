"""Studies: grids of runs that differ in a few config keys, and the tables that compare them."""
