"""`flax-vit`: what people type and what they read. Imports everything else."""
