"""`python -m flax_vit` is `flax-vit`."""

from convert.command_line.cli import main

if __name__ == '__main__':
    main()
