"""Hugging Face repositories as sources: ORG/NAME or ORG/NAME@REVISION instead of a local path.

huggingface_hub downloads into its cache, goes on where an earlier download stopped, and shows its
progress. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean everywhere.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from omni2_jax.checkpoint.tokenizer import FILES as TOKENIZER_FILES
from omni2_jax.files import first_line

ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
LANGUAGE_MODEL = ("config.json", "generation_config.json", *TOKENIZER_FILES, *WEIGHTS)


@dataclass(frozen=True)
class Source:
    """A kind of source.

    patterns: of the files that are needed; a repository often holds the same weights in several
    formats. file: the one file that is the source, None where the source is a directory.
    """

    patterns: tuple[str, ...]
    file: str | None = None


LLM = Source(LANGUAGE_MODEL)
OMNI2 = Source(
    (
        *LANGUAGE_MODEL,
        *(f"tts_tokenizer/{name}" for name in TOKENIZER_FILES),
        # config.json may name a Whisper file, which tells the number of attention heads.
        "speech_encoder/*.pt",
        "models/speech_encoder/*.pt",
    )
)
WHISPER = Source(("config.json", "model.bin", *WEIGHTS))
DECODER = Source(
    (
        "cosyvoice.yaml",
        "cosyvoice2.yaml",
        "flow.yaml",
        "flow.pt",
        "hift.pt",
        "campplus.onnx",
        "spk2info.pt",
    )
)
SPEECH_TOKENIZER = Source(("speech_tokenizer_v2.onnx",), file="speech_tokenizer_v2.onnx")


def local_path(name: str | None, source: Source) -> Path | None:
    """The local path of a source that is given as a path or as the id of a repository.

    A path that exists wins over a repository of the same name. None for None. Raises ValueError,
    one line, if there is neither, or if the repository cannot be downloaded.
    """
    if name is None:
        return None
    path = Path(name)
    if name and path.exists():
        return path
    match = ID.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name} does not exist, and it is no Hugging Face id (ORG/NAME or ORG/NAME@REVISION)"
        )
    return download(match["repository"], match["revision"], source)


def download(repository: str, revision: str | None, source: Source) -> Path:
    """Download the needed files of a repository, unless the cache holds them -> their directory.

    For a source that is one file, the path of that file. Raises ValueError, one line, if the
    repository or the revision does not exist, is not open to this user, or cannot be reached.
    """
    from huggingface_hub import constants, errors, snapshot_download

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{repository} does not exist on this machine, and {reason}")

    log_in = "log in with 'hf auth login', or set HF_TOKEN"
    try:
        directory = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(source.patterns))
        )
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repository}"
        raise refuse(f"its repository is gated: accept its terms at {page}, and {log_in}") from None
    except errors.RepositoryNotFoundError:
        raise refuse(
            f"{constants.ENDPOINT} has no such repository, or it is private ({log_in})"
        ) from None
    except errors.RevisionNotFoundError:
        raise refuse(f"its repository has no revision {revision}") from None
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise refuse("its files are not all in the cache (HF_HUB_OFFLINE is set)") from None
        cause = first_line(error.__cause__ or error)
        raise refuse(f"{constants.ENDPOINT} cannot be reached: {cause}") from None
    except (
        Exception
    ) as error:  # of the HTTP library, another one in each version of huggingface_hub
        raise refuse(
            f"its download failed, repeat the command to go on with it: {first_line(error)}"
        ) from None
    path = directory / source.file if source.file else directory
    if not path.exists():
        raise refuse(f"its repository holds no {' or '.join(source.patterns)}")
    return path
