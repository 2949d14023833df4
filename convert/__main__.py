"""`python -m convert` is `flax-vit`."""

from convert.cli import main

if __name__ == '__main__':
    main()
