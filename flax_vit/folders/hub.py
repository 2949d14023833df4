"""Folders of models on the Hugging Face Hub: read by name, and published."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from flax_vit.folders.card import card, is_card
from flax_vit.folders.config import CARD, CONFIG, check_hashes, is_weights, read_config

NAME = r'\w[\w.-]*/\w[\w.-]*'  # of a repository


def local_folder(
    name: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """The folder of that name, or the local copy of the model `owner/name` on the hub, fetched where it is needed.

    The copy is the hub library's: one per commit, in `cache_dir` or the library's own; with HF_HUB_OFFLINE=1 nothing
    else is asked. Raises FileNotFoundError when there is neither, another OSError when the hub cannot be read,
    ValueError for a `revision` of a folder here, and ImportError when the library is missing.
    """
    if Path(name).exists() or isinstance(name, os.PathLike):
        if revision is not None:
            raise ValueError(
                f'{name} is taken for a folder here, which has no revision {revision}; only the hub knows revisions.'
            )
        return Path(name)
    if not re.fullmatch(NAME, name):
        raise FileNotFoundError(f"{name} is neither a folder here nor a name on the Hugging Face Hub ('owner/name').")
    hub = huggingface_hub()
    with asking(hub, name, revision):
        config = Path(hub.hf_hub_download(name, CONFIG, revision=revision, cache_dir=cache_dir))
        commit, files = config.parent.name, [file['file'] for file in read_config(config.parent)['weights']]
        copy = hub.snapshot_download(name, revision=commit, cache_dir=cache_dir, allow_patterns=[CONFIG, *files])
    return Path(copy)


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Publish a folder that `save_pretrained` wrote on the Hugging Face Hub, in one commit.

    Weights of an earlier model there are removed by the same commit. The page is the folder's README.md; without one,
    a card is made of the configuration. A page that was edited on the hub is kept, unless the folder's own was edited,
    too. Needs a login (`hf auth login`, or HF_TOKEN).

    Args:
        folder: The folder.
        repo_id: 'owner/name'. The repository is made if need be,
        private: and is then private or not; None: as the account's setting says.
        revision: The branch; None: the main one.
        commit_message: What the commit says.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: When there is no such folder.
        ImportError: When the hub's library is missing.
        ValueError: When the folder is not whole, and when the repository holds another kind of model.
        huggingface_hub.errors.HfHubHTTPError: And the library's others, as it raises them.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_hashes(folder, config)
    hub = huggingface_hub()
    files: dict[str, Path | bytes] = {file['file']: folder / file['file'] for file in config['weights']}

    api = hub.HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the owner, if none was given
    there = api.list_repo_files(repo_id, revision=revision)

    def published(name: str) -> Path:
        return Path(api.hf_hub_download(repo_id, name, revision=revision))

    try:
        old = read_config(published(CONFIG).parent) if CONFIG in there else None
    except ValueError as error:
        raise ValueError(f'{repo_id} on the Hugging Face Hub is left as it is; give another name: {error}') from error
    files[CONFIG] = folder / CONFIG
    page = folder / CARD
    if page.exists() and not is_card(page.read_text(encoding='utf-8', errors='replace'), config):
        files[CARD] = page
    elif CARD not in there or (old and is_card(published(CARD).read_text(encoding='utf-8', errors='replace'), old)):
        files[CARD] = card(config, repo_id).encode()
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    operations += [hub.CommitOperationDelete(name) for name in there if is_weights(name) and name not in files]
    message = commit_message or f'{config["model"]}, by flax_vit'
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)


@contextmanager
def asking(hub: ModuleType, name: str, revision: str | None) -> Iterator[None]:
    """FileNotFoundError where the hub's library finds nothing of that name, neither there nor in its cache."""
    try:
        yield
    except (hub.errors.LocalEntryNotFoundError, hub.errors.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f'{name} is neither a local folder nor in the cache, and the Hugging Face Hub was not asked or did '
            'not answer: unset HF_HUB_OFFLINE, or check the connection.'
        ) from error
    except (
        hub.errors.RepositoryNotFoundError,
        hub.errors.RevisionNotFoundError,
        hub.errors.EntryNotFoundError,
    ) as error:
        at = f' at the revision {revision}' if revision else ''
        raise FileNotFoundError(
            f'{name} is not here, and the Hugging Face Hub did not give it{at}: {type(error).__name__}. '
            'A private one needs `hf auth login`.'
        ) from error
    except hub.errors.HTTPError as error:  # httpx's: no connection, a timeout, a server in trouble
        raise OSError(f'{name}: the Hugging Face Hub cannot be read: {type(error).__name__}: {error}') from error


def huggingface_hub() -> ModuleType:
    """The hub's library. Raises ImportError that says how to install it."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError("The Hugging Face Hub needs its library: pip install 'flax-vit[hub]'.") from error
    return huggingface_hub
