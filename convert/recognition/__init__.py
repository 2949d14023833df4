"""What the arrays are: trainers' wrappers off, the layout, the fields. Imports files and flax_vit."""
