"""Every number that the README states comes out of here: `python -m bench canon`."""
