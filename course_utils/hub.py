"""The Hugging Face Hub: whether it answers, and what to do when something with it fails."""

import hashlib
import os
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import auth_check, constants, get_token
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HfHubHTTPError

TOKENS = "https://huggingface.co/settings/tokens"
WITHOUT = "or set COURSE_PROFILE=quick, which needs no Hub"


def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face Hub can be reached, and is well, within `timeout` seconds."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=timeout).close()
        return True
    except urllib.error.HTTPError as error:      # it answered, if only with an error
        return error.code < 500
    except (OSError, ValueError):
        return False


@contextmanager
def explained(name: str, kind: str = "model"):
    """Let what fails with the Hub's repository `name` in this block fail in one sentence.

    Files of it in the cache that are not what their checksum says are deleted, so that the next
    try begins anew. `kind` is "model", "dataset" or "space". What fails with a folder of this
    name is left as it is. Raises ConnectionError.
    """
    try:
        yield
    except Exception as error:                   # each library has its own; the Hub knows the cause
        if Path(str(name).removeprefix("local-dir:")).exists():
            raise
        name = str(name).removeprefix("hf-hub:")
        what, remedy = _diagnosis(error, name, kind)
        _drop_damaged(name, kind)
        raise ConnectionError(f"Could not use {name!r} on the Hub ({what}): {remedy}.") from None


def _diagnosis(error, name, kind):
    """What went wrong and what to do. Where the error holds no answer of the Hub, ask it again."""
    if constants.HF_HUB_OFFLINE:
        return ("HF_HUB_OFFLINE is set, and it is not in the cache",
                f"unset that variable and restart Jupyter, {WITHOUT}")
    if not hub_answers():
        return "the Hub does not answer", f"check the network and run this again, {WITHOUT}"
    answer = getattr(error, "response", None)
    if answer is None:
        try:
            auth_check(name, repo_type=kind)
        except HfHubHTTPError as refusal:
            answer = refusal.response
        except Exception:                        # the first error says more
            pass
    if answer is None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(".")
        return (f"it came damaged, incomplete or in no known form: {reason}",
                f"run this again, {WITHOUT}")
    status = answer.status_code
    page = f"https://huggingface.co/{'' if kind == 'model' else f'{kind}s/'}{name}"
    if status == 401 and get_token():
        return ("it refuses your token, which may have expired",
                f"make a new one at {TOKENS}, then log in with `hf auth login` or, if it is set, "
                "correct HF_TOKEN")
    return f"HTTP {status}", {
        401: "check the name and, if it is private or gated, log in with `hf auth login`",
        403: f"ask for access at {page}, or use a token with the right to write from {TOKENS}",
        404: "check the name and, if it is private, that your token may read it",
        429: f"these were too many requests, so wait five minutes and run this again, {WITHOUT}",
    }.get(status, f"the Hub has trouble, so wait some minutes and run this again, {WITHOUT}")


def _drop_damaged(name, kind):
    """Delete the cached files whose content is not what their name, a checksum, says."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    for blob in folder.glob("blobs/*"):
        content = blob.read_bytes()
        as_git = hashlib.sha1(b"blob %d\0" % len(content) + content)
        if blob.name not in (hashlib.sha256(content).hexdigest(), as_git.hexdigest()):
            blob.unlink()
