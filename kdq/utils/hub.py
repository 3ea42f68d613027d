"""The Hugging Face hub: files are fetched from ``hf:owner/name[:file]``, and folders uploaded to ``hf:owner/name``."""

import logging
from collections.abc import Sequence
from pathlib import Path

from kdq.utils.errors import KdqError, one_line

#: How a name on the hub begins.
HUB = "hf:"
#: The names that a shared model's files have there.
PACKED, ROW, CARD = "model.kdq", "row.json", "README.md"


def fetch(source: str, files: Sequence[str]) -> Path:
    """The local copy, in the hub's own cache, of the file that ``hf:owner/name:file`` names; without a name, of the
    first of ``files`` that the repository has.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are told in our one line
    place, _, file = source.removeprefix(HUB).partition(":")
    repository = _repository(place, f"{source} is not {HUB}owner/name or {HUB}owner/name:file")
    tried = (file,) if file else files
    for name in tried:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:
            raise KdqError(
                f"cannot fetch {name} of {repository} (no network?): download it elsewhere and give its path"
            ) from error
        except EntryNotFoundError:
            continue
        except (RepositoryNotFoundError, GatedRepoError) as error:
            raise KdqError(
                f"cannot fetch {name} of {repository}: the hub shows no such repository to you; check its name, or if "
                "it is private or gated log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except Exception as error:  # the hub raises many kinds: a proxy's, a server's, ...
            raise KdqError(f"cannot fetch {name} of {repository}: {one_line(error)}") from error
    raise KdqError(f"{repository} holds none of {', '.join(tried)}: name its file, {HUB}{repository}:FILE")


def upload(folder: Path, target: str, message: str) -> str:
    """Upload the files of ``folder`` to ``target``, ``hf:owner/name``, which is made, public, where it is not there;
    files of other names that it has stay. Returns its address.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    repository = _repository(target.removeprefix(HUB), f"{target} is not {HUB}owner/name")
    disable_progress_bars()
    api = HfApi(library_name="kdq")
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # of the hub's package, of the library below it, or of the server's answer
        raise KdqError(f"cannot upload to {repository}: {_why(error, api.endpoint)}") from error
    return str(address)


def _repository(name: str, problem: str) -> str:
    if name.count("/") != 1:
        raise KdqError(problem)
    return name


def _why(error: BaseException, endpoint: str) -> str:
    """What is wrong, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"the hub refuses the token ({status}): log in with `hf auth login`, or set HF_TOKEN, with a token that "
            "may write there"
        )
    if type(error).__name__ in ("ConnectError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError"):
        return f"{endpoint} cannot be reached: give the command again where there is a network"
    return one_line(error)
