"""One file per system of the family: the module and its loss."""
