"""PyTorch modules of models that no package has, written from the papers' code: what their ports are compared with."""
