"""Fetching base models from the hub: what a pull would fetch, and the lock that pins what it fetched."""

from collections.abc import Mapping
from dataclasses import dataclass

from mos_cli.bundles.adapters import AdapterIndex, Lock, base_name, check_lock, lock_path
from mos_cli.bundles.base_models import DIFFUSERS_INDEX, diffusers_config, is_base_file
from mos_cli.bundles.sources import hub_snapshot, offline
from mos_cli.errors import ModelError
from mos_cli.utils.files import atomic_write, make_folder, sha256_of


@dataclass(frozen=True)
class Offer:
    """What the hub has of a base model, before anything is downloaded.

    Args:
        sizes: bytes of every file that a pull fetches.
        hashes: the sha256 of those that the hub states it for, the weights among them.
    """

    repo_id: str
    revision: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]

    @property
    def size(self) -> int:
        return sum(self.sizes.values())


def look_up(index: AdapterIndex, lock: Lock | None) -> Offer:
    """Asks the hub what a pull would fetch: of the locked revision, or of the adapter's, or else of the newest.

    Raises:
        ModelError: the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    source = index.source
    assert source is not None
    name, wanted = base_name(index), source.revision if lock is None else lock.revision
    if offline():
        raise ModelError(f"cannot get {name}: HF_HUB_OFFLINE is set")
    try:
        found = HfApi().model_info(source.repo_id, revision=wanted, files_metadata=True, timeout=30)
    except GatedRepoError:
        page = f"https://huggingface.co/{source.repo_id}"
        raise ModelError(f"{source.repo_id} asks for its terms on {page}: accept them there, then log in") from None
    except RepositoryNotFoundError:
        raise ModelError(f"the hub has no public repository {source.repo_id}") from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{source.repo_id} has no revision {wanted}: delete {lock_path(index)} to take another"
        ) from None
    except Exception as error:
        # The client raises errors of several transports without a common base class.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot get {name}: the hub cannot be reached ({reason[:160]})") from None
    if wanted is not None and found.sha != wanted:
        raise ModelError(f"{source.repo_id} answered with revision {found.sha}, not {wanted}")
    files = [file for file in found.siblings or () if is_base_file(file.rfilename)]
    if found.sha is None or DIFFUSERS_INDEX not in {file.rfilename for file in files}:
        raise ModelError(f"{source.repo_id} holds no pipeline of diffusers: it has no {DIFFUSERS_INDEX}")
    return Offer(
        source.repo_id,
        found.sha,
        {file.rfilename: file.size or 0 for file in files},
        {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None},
    )


def pull(index: AdapterIndex, offer: Offer, lock: Lock | None, *, accept_terms: bool) -> Lock:
    """Downloads a base model into the hub's cache, checks it, and locks its revision and the sha256 of every file.

    Files that are in the cache already are not downloaded again.

    Raises:
        ModelError: terms were not accepted, the download fails, or a file is another than the lock or the hub says.
    """
    terms = index.terms
    if terms is not None and not accept_terms and (lock is None or lock.accepted != terms.name):
        raise ModelError(
            f"{base_name(index)} is used under the {terms.name} ({terms.url}): pass --accept-terms if you accept them"
        )
    folder = hub_snapshot(offer.repo_id, offer.revision, list(offer.sizes), silent=False)
    if folder.name != offer.revision:
        raise ModelError(f"the hub's cache has revision {folder.name} of {offer.repo_id}, not {offer.revision}")
    files = {}
    for name in offer.sizes:
        if not (folder / name).is_file():
            raise ModelError(f"{name} of {offer.repo_id} was not downloaded")
        files[name] = sha256_of(folder / name)
        for expected in (offer.hashes.get(name), None if lock is None else lock.files.get(name)):
            if expected is not None and expected != files[name]:
                raise ModelError(
                    f"{name} of {offer.repo_id} does not match its sha256: delete {folder}, and pull again"
                )
    if (found := diffusers_config(folder).get("_class_name")) != index.pipeline:
        raise ModelError(f"{offer.repo_id} is a pipeline of class {found}, not {index.pipeline}")
    made = Lock(
        schema="mos-lock/1",
        name=base_name(index),
        repo_id=offer.repo_id,
        revision=offer.revision,
        accepted=None if terms is None else terms.name,
        files=files,
    )
    check_lock(index, made)
    make_folder(lock_path(index).parent)
    atomic_write(lock_path(index), (made.model_dump_json(indent=1, by_alias=True) + "\n").encode(), overwrite=True)
    return made
