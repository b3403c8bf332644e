"""Models on the Hugging Face hub: fetched to this machine's cache, and put there. No token is ever printed."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = ["config.json", "*.safetensors", "*.npy", "*.md", "evaluation.json", "autoencoder/*"]
"""Of a repository, what an export is made of."""
ADVICE = re.compile(r"\s*(For more information|An error happened while|If you are trying to access a private)")
"""Where what huggingface_hub says of an error ends."""
NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def fetch(repository: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder, in the cache of huggingface_hub, with the export that a repository of the hub holds.

    Raises:
        ConnectionError: the hub does not answer, has no such repository, or refuses.
        ImportError: huggingface_hub is missing.
    """
    with _one_line(f"cannot fetch {repository} from the hub", token):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=FILES))


def make_repository(repository: str, *, private: bool = False, token: str | None = None) -> None:
    """Asks the hub for a repository, which may be there: whether it answers and lets us is known before files are made.

    Raises:
        ValueError: no name of a repository.
        ConnectionError: the hub does not answer, or refuses.
        ImportError: huggingface_hub is missing.
    """
    if not NAME.fullmatch(repository):
        raise ValueError(f"a model on the hub is called OWNER/NAME, got {repository!r}")
    with _one_line(f"cannot put {repository} onto the hub", token):
        from huggingface_hub import HfApi

        HfApi(token=token).create_repo(repository, private=private, exist_ok=True)


def upload(save: Callable[[Path], None], repository: str, *, token: str | None = None, message: str) -> str:
    """Puts what ``save`` writes into a folder into a repository that is there, in one commit; returns its address.

    Raises:
        ConnectionError: the hub does not answer, or refuses.
        ImportError: huggingface_hub is missing.
    """
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written) / repository.rpartition("/")[2]
        save(folder)
        with _one_line(f"cannot put {repository} onto the hub", token):
            from huggingface_hub import HfApi

            hub = HfApi(token=token)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url)


@contextmanager
def _one_line(what: str, token: str | None) -> Iterator[None]:
    """Errors of huggingface_hub, which come from several HTTP libraries, as one, in one line, without the token."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what}: it needs huggingface_hub: pip install huggingface_hub") from error
    except Exception as error:
        text = ADVICE.split(" ".join(str(error).split()).removeprefix("Got: "))[0] or type(error).__name__
        raise ConnectionError(f"{what}: {_without_tokens(text, token)[:500]}") from None


def _without_tokens(text: str, given: str | None) -> str:
    """The text with every token of the hub blotted out: the one given, the one that is set, and what looks like one."""
    from huggingface_hub import get_token

    for token in filter(None, (given, get_token())):
        text = text.replace(token, "...")
    return re.sub(r"\bhf_\w{8,}", "...", text)
