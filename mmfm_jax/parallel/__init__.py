"""Devices, meshes and processes, and how arrays lie on them."""
