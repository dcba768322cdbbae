"""The networks of the demo model as lib/models computes them, named as in the releases: `state_dict` is the file."""
