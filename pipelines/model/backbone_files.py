"""Files of a pretrained backbone: a local folder, or a hub repository in the local cache."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, logging

from pipelines.runtime.errors import UsageError
from shards.local_files import open_file, read_file

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


@dataclass(frozen=True, slots=True)
class BackboneFiles:
    """Where a backbone's files are on this machine."""

    source: str
    """Hub id, or name of the local folder."""
    config: Path
    preprocessor: Path | None
    card: Path | None
    weights: tuple[Path, ...]
    """Safetensors files in the order of their names; empty for random weights."""
    revision: str | None
    """Commit, of a hub repository."""


def source_name(encoder: str) -> str:
    """Return the hub id, or the name of a local folder without the folders above it."""
    folder = Path(encoder)
    return folder.resolve().name if folder.is_dir() else encoder


def find_backbone(encoder: str, weights: str, revision: str | None = None) -> BackboneFiles:
    """Find the files of `--model.encoder`, downloaded if it is a hub id that is not in the cache.

    Args:
        encoder: local folder or hub id.
        weights: `pretrained`, `none`, or a safetensors file.
        revision: commit of the hub repository; default: the newest, or the one in the cache.

    Raises:
        UsageError: if a file is missing or is a pickle, with the files to bring.
    """
    own = () if weights in ("pretrained", "none") else (find_weights_file(weights),)
    if Path(encoder).is_dir():
        return find_local(Path(encoder), weights, own)
    if encoder.count("/") > 1 or encoder.startswith((".", "/", "~")) or not encoder:
        raise UsageError(f"--model.encoder {encoder}: the folder does not exist; check the path")
    return HubRepository(encoder, revision).find(weights, own)


def find_weights_file(weights: str) -> Path:
    """Return the file of `--model.encoder-weights FILE`. Raises UsageError if it is not usable."""
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise UsageError(
            f"--model.encoder-weights {weights}: use pretrained, none, or a .safetensors file"
        )
    if not path.is_file():
        raise UsageError(
            f"--model.encoder-weights {weights}: the file does not exist; check the path"
        )
    return path


def find_local(folder: Path, weights: str, own: tuple[Path, ...]) -> BackboneFiles:
    """Find the files in a local folder. Raises UsageError if one is missing."""

    def optional(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    config = optional(CONFIG)
    if config is None:
        raise UsageError(
            f"--model.encoder {folder}: it has no {CONFIG}; give a folder that save_pretrained "
            "wrote"
        )
    if weights == "pretrained":
        index = optional(INDEX)
        if (folder / WEIGHTS).is_file():
            own = (folder / WEIGHTS,)
        elif index is not None:
            own = tuple(folder / name for name in read_shards(index))
            if lacking := [path.name for path in own if not path.is_file()]:
                raise UsageError(
                    f"--model.encoder {folder}: it has no {', '.join(lacking)}; copy the complete "
                    "folder"
                )
        else:
            pickles = [name for name in PICKLES if (folder / name).exists()]
            raise UsageError(no_safetensors(str(folder), pickles))
    source = folder.resolve().name
    return BackboneFiles(source, config, optional(PREPROCESSOR), optional(CARD), own, None)


def no_safetensors(encoder: str, pickles: Sequence[str]) -> str:
    """Describe a repository without safetensors, and the remedy."""
    found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "none"
    return (
        f"--model.encoder {encoder}: it has no {WEIGHTS} ({found}); use a repository that has one, "
        "or --model.encoder-weights none or FILE.safetensors"
    )


def read_shards(index: Path) -> list[str]:
    """Read the names of the weights files. Raises UsageError if the index is damaged."""
    names = read_json(index, "--model.encoder").get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        for name in names.values()
    ):
        raise UsageError(f"--model.encoder: {index} does not list safetensors files")
    return sorted(set(names.values()))


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError for anything else."""
    try:
        return msgspec.json.decode(read_file(path), type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag}: {path} is not a JSON object: {error}") from error


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository on the Hugging Face hub, read through the local cache."""

    name: str
    revision: str | None

    def find(self, weights: str, own: tuple[Path, ...]) -> BackboneFiles:
        """Find or download the files. Raises UsageError if one is missing."""
        disable_progress_bars()
        # It reports each of five retries; the error names what failed.
        logging.set_verbosity_error()
        config = self.download(CONFIG)
        if config is None:
            raise UsageError(f"--model.encoder {self.name}: the repository has no {CONFIG}")
        # One commit, even if another is pushed in between.
        commit = config.parent.name
        pinned = HubRepository(self.name, commit)
        if weights == "pretrained":
            own = pinned.find_weights()
        return BackboneFiles(
            self.name,
            config,
            pinned.download(PREPROCESSOR, optional=True),
            pinned.download(CARD, optional=True),
            own,
            commit,
        )

    def find_weights(self) -> tuple[Path, ...]:
        """Find or download all safetensors files. Raises UsageError if there are none."""
        single = self.download(WEIGHTS, alternative=INDEX)
        if single is None:
            pickles = [name for name in PICKLES if self.has(name)]
            raise UsageError(no_safetensors(self.name, pickles))
        if single.name == WEIGHTS:
            return (single,)
        shards = [self.download(name) for name in read_shards(single)]
        if None in shards:
            raise UsageError(f"--model.encoder {self.name}: a file of {INDEX} is missing")
        return tuple(path for path in shards if path is not None)

    def download(
        self, name: str, *, optional: bool = False, alternative: str | None = None
    ) -> Path | None:
        """Return the path of a file in the cache, downloaded if needed; None if there is none.

        Raises UsageError if the hub cannot be reached or the repository does not exist.
        """
        try:
            return Path(hf_hub_download(self.name, name, revision=self.revision))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if alternative is not None:
                return self.download(alternative)
            if optional:
                return None
            raise UsageError(self.unreachable()) from error
        except EntryNotFoundError:
            return None if alternative is None else self.download(alternative)
        except (RepositoryNotFoundError, GatedRepoError, HFValidationError) as error:
            raise UsageError(
                f"--model.encoder {self.name}: neither a local folder nor a hub repository that "
                "can be read (a private or gated one needs `hf auth login`)"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise UsageError(
                f"{self.unreachable()} ({' '.join(str(error).split())[:200]})"
            ) from error

    def has(self, name: str) -> bool:
        """Whether the repository has a file, which is not downloaded."""
        try:
            return file_exists(self.name, name, revision=self.revision)
        except (HfHubHTTPError, OSError):
            return False

    def unreachable(self) -> str:
        """Describe which files to bring to a machine without network, and how."""
        names = f"{CONFIG} {PREPROCESSOR} {WEIGHTS}"
        folder = self.name.rpartition("/")[2]
        return (
            f"--model.encoder {self.name}: not in the local cache, and the hub cannot be reached; "
            f"where there is network, run `hf download {self.name} {names} --local-dir {folder}`, "
            f"copy the folder here and pass --model.encoder {folder}"
        )


def digest(files: Sequence[Path]) -> str | None:
    """Compute the sha256 of a file; of several, that of their digests; None without files."""
    digests = []
    for path in files:
        with open_file(path) as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) > 1:
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    return digests[0] if digests else None
