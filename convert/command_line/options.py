"""The options that several commands take."""

import rich_click as click

from convert.command_line.console import be_quiet


def size(_context: click.Context, _option: click.Parameter, value: str | None) -> int | tuple[int, int] | None:
    """'224' -> 224, '224x160' -> (224, 160)."""
    if value is None:
        return None
    try:
        numbers = [int(number) for number in value.split('x')]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise click.BadParameter(f'{value!r} is not a size; write 224, or 224x160 for height x width.')
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


MODEL = (  # what the weights may not tell
    click.Option(
        ['--image-size'], metavar='SIZE', callback=size, help='Size of the images: 224, or 224x160, height x width.'
    ),
    click.Option(['--patch-size'], metavar='SIZE', callback=size, help='Size of a patch: 16, or 16x8.'),
    click.Option(
        ['--heads'],
        metavar='N',
        type=click.IntRange(1),
        help='Attention heads; not in the weights of ViT and SimpleViT.',
    ),
    click.Option(['--dim-head'], metavar='N', type=click.IntRange(1), help='Size of an attention head, if not 64.'),
    click.Option(['--pool'], type=click.Choice(['cls', 'mean']), help='How ViT or DeepViT pools, if not cls.'),
    click.Option(
        ['--dropout'],
        metavar='RATE',
        type=click.FloatRange(0, 1),
        help='Dropout of ViT or DeepViT during training, if not 0.',
    ),
    click.Option(
        ['--emb-dropout'], metavar='RATE', type=click.FloatRange(0, 1), help='Dropout after the embedding, if not 0.'
    ),
    click.Option(
        ['--transform-scale'],
        metavar='TRUE|FALSE',
        type=click.BOOL,
        help="Whether dvit_repo's DeepViT scales the maps after re-attention.",
    ),
    click.Option(
        ['--scale-adjustment'],
        metavar='FACTOR',
        type=click.FloatRange(0, min_open=True),
        help="Of dvit_repo's DeepViT: what its blocks' branches are multiplied by.",
    ),
    click.Option(['--channels'], metavar='N', type=click.IntRange(1), help='Channels of the images, if not 3.'),
    click.Option(
        ['--image-format'],
        type=click.Choice(['channels_first', 'channels_last']),
        metavar='FORMAT',
        help='channels_first or channels_last. Needed only when images have as many channels as pixels on a side.',
    ),
    click.Option(
        ['--num-classes'],
        metavar='N',
        type=click.IntRange(0),
        help='0 drops the head: the model gives pooled features.',
    ),
    click.Option(
        ['--key'], metavar='NAME', help='Which model to take, if the file holds several; the error lists them.'
    ),
    click.Option(
        ['--part'], type=click.Choice(['transformer']), help='Take only the Transformer, whatever surrounds it.'
    ),
    click.Option(
        ['--release'],
        metavar='VERSION',
        help='The vit-pytorch release that wrote the file, such as 0.6.5, if several fit.',
    ),
)


def hush(context: click.Context, _option: click.Parameter, quiet: bool) -> None:
    """Before the command or behind it, both are heard."""
    if quiet or context.parent is None:
        be_quiet(quiet)


EVERYWHERE = (  # of every command, because they are thought of last
    click.Option(
        ['--quiet', '-q'],
        is_flag=True,
        expose_value=False,
        callback=hush,
        help='Print only errors and warnings; the exit status is the result.',
    ),
    click.Option(['--debug'], is_flag=True, expose_value=False, help='Show the traceback of an error.'),
)
