"""The sizes that papers and benchmarks speak of, by name. Imports nothing."""

# Of Touvron et al. 2021 (arXiv:2012.12877), table 1, and of Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1; the
# heads have 64 numbers each, vit-pytorch's default. 'readme' is the example of vit-pytorch's README.
SIZES: dict[str, dict[str, int]] = {
    'ti': {'dim': 192, 'depth': 12, 'heads': 3, 'mlp_dim': 768},
    's': {'dim': 384, 'depth': 12, 'heads': 6, 'mlp_dim': 1536},
    'b': {'dim': 768, 'depth': 12, 'heads': 12, 'mlp_dim': 3072},
    'l': {'dim': 1024, 'depth': 24, 'heads': 16, 'mlp_dim': 4096},
}
README = {'image_size': 256, 'patch_size': 32, 'dim': 1024, 'depth': 6, 'heads': 16, 'mlp_dim': 2048}
FIELDS: dict[str, dict[str, int]] = {'readme': README} | {
    f'{size}{patch_size}': {'image_size': 224, 'patch_size': patch_size, **fields}
    for size, fields in SIZES.items()
    for patch_size in (16, 32)
}
