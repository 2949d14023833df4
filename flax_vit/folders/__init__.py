"""A folder with a model: written whole, read onto a device or a mesh, published on the hub."""
