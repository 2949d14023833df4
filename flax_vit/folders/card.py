"""The page that goes with a folder of a model: what it is, how to use it, where it comes from."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from flax_vit.architectures import classes
from flax_vit.folders.config import origin

FOLDER = 'this/folder'  # what a card calls the folder it lies in
USE = """```python
import flax_vit

model, variables = flax_vit.from_pretrained('{name}')
outputs = model.apply(variables, {images})  # {inputs} -> {outputs}
```"""


def card(config: Mapping[str, Any], name: str = FOLDER) -> str:
    """The model card, in Markdown with the Hugging Face Hub's header, of a checked `config.json`.

    `name` is what `from_pretrained` takes.
    """
    fields = config['fields']
    labels = fields.get('num_classes')
    task = 'pipeline_tag: image-classification' if labels else 'pipeline_tag: image-feature-extraction'
    if 'image_size' in fields:
        size = fields['image_size']
        height, width = size if isinstance(size, list) else (size, size)
        axes = [height, width, fields['channels']]
        axes = axes[2:] + axes[:2] if fields.get('image_format') == 'channels_first' else axes
        images, inputs = 'images', f'floats (batch, {", ".join(map(str, axes))})'
        width = fields.get('rep_size') or fields['dim']
        outputs = f'logits (batch, {labels})' if labels else f'features (batch, {width})'
    else:  # a Transformer alone
        images, inputs = 'tokens', f'floats (batch, tokens, {fields["dim"]})'
        outputs = inputs
    use = USE.format(name=name, images=images, inputs=inputs, outputs=outputs)
    whose = getattr(classes()[config['model']], 'ORIGIN', 'vit-pytorch')
    parts = [
        '---\n' + '\n'.join(['library_name: flax_vit', task, 'tags:', '- flax', '- jax', f'- {whose}']) + '\n---',
        f'# {config["model"]}',
        f"{whose}'s {config['model']}, as a Flax module of flax_vit.",
        use,
        '## Fields',
        _table('field', 'value', fields),
    ]
    facts, verified = origin(config)
    if facts:
        parts += ['## Where it comes from', _table('fact', 'value', facts)]
    if verified:
        parts += [
            '## Verified',
            f'{verified["time"]}: {verified["verdict"]} The measure: {verified["criterion"]} '
            'All figures are in `config.json`; `flax-vit verify` on this folder takes the measure again, '
            'without PyTorch.',
        ]
    hashes = {file['file']: file['sha256'] for file in config['weights']}
    parts += ['## Weights', _table('file', 'sha256', hashes)]
    return '\n\n'.join(parts) + '\n'


def is_card(text: str, config: Mapping[str, Any]) -> bool:
    """Whether `text` is the card that was written with that configuration, under whatever name, unedited."""
    general = re.sub(r"from_pretrained\('.*?'\)", f"from_pretrained('{FOLDER}')", text, count=1)
    return card_hash(general) == config.get('card')


def card_hash(text: str) -> str:
    """By which a configuration knows its card again, whatever a later version would write."""
    return hashlib.sha256(text.encode()).hexdigest()


def _table(name: str, value: str, rows: Mapping[str, Any]) -> str:
    lines = [f'| {name} | {value} |', '|---|---|']
    return '\n'.join(lines + [f'| {_code(key)} | {_code(item)} |' for key, item in rows.items() if item is not None])


def _code(value: Any) -> str:
    """Any value as one line of code in a table's cell; names of files and tensors come from strangers."""
    if isinstance(value, Mapping):
        return '<br>'.join(f'{_code(key)}: {_code(item)}' for key, item in value.items())
    text = ' '.join(str(value).split()).replace('|', '\\|')
    fence = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{fence} {text} {fence}' if '`' in text else f'`{text}`'
