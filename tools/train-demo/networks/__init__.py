"""The demo model's networks as lib/models computes them. Modules are named as in the releases, so `state_dict` is the file."""
