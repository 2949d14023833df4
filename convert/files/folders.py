"""The one checkpoint in a folder, and the files that an index of shards names."""

import re
from collections.abc import Iterable
from pathlib import Path

from convert.errors import ConversionError
from convert.files.arrays import JSON_BYTES, read_json
from convert.files.other_files import refuse_parts
from convert.files.zip_directory import quote

MOST_NAMES = 20  # that a message lists
_SUFFIXES = (
    ('.pt', '.pth', '.bin', '.ckpt', '.t7', '.tar', '.safetensors', '.npz', '.index.json'),
    ('.pt2', '.pkl', '.pickle', '.joblib', '.gz', '.zip'),  # looked for where there are none of the others
)
_BESIDE_WEIGHTS = re.compile(  # trainers' own files
    r'(optimizer|scheduler|scaler|sampler|dl_state_dict|training_args|rng_state|random_states|custom_checkpoint)[_0-9]*\.'
)


def only_checkpoint(folder: Path) -> Path:
    """The one checkpoint in a folder, or one level down where there is none in itself."""
    refuse_parts((path.name for path in folder.iterdir()), str(folder))
    found = _checkpoints(folder)
    below = [] if found else [path for path in sorted(folder.iterdir()) if path.is_dir()]
    for inner in below:
        found += _checkpoints(inner)
    if len(found) == 1:
        return found[0]
    for inner in sorted({path.parent for path in found}) or below:
        refuse_parts((path.name for path in inner.iterdir()), str(inner))
    if not found:
        held = sorted(path.name for path in folder.iterdir())
        raise ConversionError(f'a folder without a checkpoint, also one level down: it holds {quote(held)}')
    more = f' and {len(found) - MOST_NAMES} more' if len(found) > MOST_NAMES else ''
    names = sorted(str(path.relative_to(folder)) for path in found)
    raise ConversionError(f'a folder of {len(found)} checkpoints, give the one to convert: {names[:MOST_NAMES]}{more}')


def _checkpoints(folder: Path) -> list[Path]:
    """The indices and checkpoint files in a folder, without the shards of the indices."""
    found = checkpoint_names(path.name for path in folder.iterdir() if path.is_file())
    for name in sorted(found):
        if name.endswith('.index.json'):
            found -= shards(folder / name)
    return [folder / name for name in found]


def checkpoint_names(names: Iterable[str]) -> set[str]:
    """Those that are checkpoints' by their endings, and not what trainers put beside them."""
    names = [name for name in names if not _BESIDE_WEIGHTS.match(name)]
    found = ({name for name in names if name.lower().endswith(suffixes)} for suffixes in _SUFFIXES)
    return next(filter(None, found), set())


def shards(index: Path) -> set[str]:
    """The files that an index names; none where it is no index."""
    with index.open('rb') as file:
        owners = read_json(file.read(JSON_BYTES + 1)).get('weight_map')
    return set(map(str, owners.values())) if isinstance(owners, dict) else set()


def beside(index: Path, name: str) -> Path:
    """The file of that name in the index's folder. A link may lead only to where the hub's cache keeps its files."""
    folder = index.parent.resolve()
    if name in ('', '.', '..') or not set(name).isdisjoint('/\\\0'):
        raise ConversionError(f'its shard {quote(name)} is not the plain name of a file beside it')
    if (folder / name).resolve().parent not in (folder, folder.parent.parent / 'blobs'):
        raise ConversionError(f'its shard {quote(name)} is a link to another folder')
    return index.parent / name
