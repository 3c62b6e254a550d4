"""Whether the Hugging Face Hub has a model repository, asked once before anything is downloaded."""

from __future__ import annotations

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from toolkit.sites import UnsupportedModelError

CONFIGS = ("config.json", "adapter_config.json")  # a repository of a model or of an adapter has one of them
assumed_wait = 10.0  # seconds to wait for the hub: ours


def check_exists(name: str, revision: str | None = None) -> None:
    """Raise UnsupportedModelError unless a repository is in the cache of this machine or on the hub.

    The hub is asked once. transformers would ask for several files, each in several attempts, and would not say that the name is unknown.

    Args:
        name: Hub id, which is not a path that exists.
        revision: Branch, tag or commit; ``None`` means the main branch.
    """
    unknown = f"No directory or hub model {name!r}"
    missing = f"{unknown} in the cache of this machine"
    try:
        if any(isinstance(try_to_load_from_cache(name, config, revision=revision), str) for config in CONFIGS):
            return
        HfApi().model_info(name, revision=revision, timeout=assumed_wait)
    except RevisionNotFoundError as error:
        raise UnsupportedModelError(
            f"The hub model {name!r} has no revision {revision!r}: give a branch, tag or commit."
        ) from error
    except HFValidationError as error:
        raise UnsupportedModelError(f"{unknown}: give an existing directory, a .gguf file, or a hub id (owner/name).") from error
    except RepositoryNotFoundError as error:
        raise UnsupportedModelError(
            f"{unknown}: check the spelling. A private or gated model needs `hf auth login` first."
        ) from error
    except OfflineModeIsEnabled as error:
        raise UnsupportedModelError(
            f"{missing}, and downloads are switched off (HF_HUB_OFFLINE=1): check the spelling, or unset HF_HUB_OFFLINE to download it."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise UnsupportedModelError(
            f"{missing}, and the hub answers {status}: check your token (`hf auth whoami`), or try later."
        ) from error
    except Exception as error:  # the hub's library uses httpx or httpx2, whose errors share no base class
        raise UnsupportedModelError(
            f"{missing}, and the hub cannot be reached ({type(error).__name__}): check the spelling and the network connection."
        ) from error
