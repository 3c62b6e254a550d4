"""Read a model and its tokenizer from a directory, hub id or GGUF file, and write them to a directory.

Only this module and ``adapters`` call ``from_pretrained`` and ``save_pretrained``. If a checkpoint does not fit its config, transformers
initialises, drops or converts weights with at most a warning. In this module, each of these is an error.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import cached_file

from toolkit import adapters, origins, repositories, shipped, store, tensors, versions
from toolkit.shipped import SMOL_REASONER
from toolkit.sites import UnsupportedModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BITS: Mapping[str, Mapping[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True},
}
"""Name of a quantisation -> arguments of ``BitsAndBytesConfig``."""
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))  # dtypes of weights, as safetensors files name them
MODULES = 10_000  # largest number of layers, heads or experts: building more would take minutes before any check could run
HARMLESS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.(attn|attention)\.bias)$")
"""Pattern of the names of buffers in older checkpoints that transformers no longer reads. They are ignored without an error."""
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
MADE_FROM = "made_from.json"  # beside the weights: the problems that edits and training were made from, see ``origins``
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
WEIGHT_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|index\.json)$")
DESCRIBES = re.compile(
    r"^(\..*|README.*|edit\.json|grpo\.json|made_from\.json|made_by\.json|adapter_config\.json|chat_template.*|special_tokens_map\.json|added_tokens\.json"
    r"|trainer_state\.json|toolkit\.json|log\.(jsonl|parquet))$"
)
"""Pattern of the names of files that are not copied when changed weights are saved.

Some of these files describe the old weights. The others are written again when the tokenizer is saved."""


QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
"""Options of transformers' ``cached_file``. With them it returns ``None``, not an error, if a hub repository lacks the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A model and its tokenizer, as read from files or to be written to files.

    Attributes:
        model: The model.
        tokenizer: The tokenizer.
        folder: Directory that the model was read from (for an adapter, its base model). ``write`` copies other files from it, such as those
            of a multimodal processor. ``None`` for GGUF files and models that come with the toolkit.
        made_from: Records (see ``origins``) of the problems that were used to edit or train the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None = None
    made_from: tuple[origins.Record, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where and how weights are stored when a model is loaded; see ``lm.load``.

    Attributes:
        device: Device of the model; ignored if there is a ``device_map``.
        device_map: ``"auto"``, a map from modules to devices, or ``None``.
        quantization: ``"4bit"``, ``"8bit"``, a quantisation config of transformers, or ``None``.
    """

    device: str | torch.device = "cpu"
    device_map: str | Mapping[str, Any] | None = None
    quantization: Any = None

    @property
    def plain(self) -> bool:
        """True if both ``device_map`` and ``quantization`` are ``None``: the weights are loaded to one device and not quantised here."""
        return self.device_map is None and self.quantization is None

    def options(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments with which ``from_pretrained`` loads a model with this device, device map and quantisation.

        Args:
            config: Config of the model. If it says that the checkpoint is quantised already, no quantisation is added.
            dtype: Dtype in which bitsandbytes computes with 4-bit weights.

        Raises:
            ImportError: accelerate or bitsandbytes is not installed.
            ValueError: ``quantization`` is unknown.
        """
        if self.plain and getattr(config, "quantization_config", None) is None:
            return {}
        require("accelerate", "device_map and quantised weights")
        options: dict[str, Any] = {"device_map": self.device_map or {"": self.device}}
        if isinstance(self.quantization, str):
            if self.quantization not in BITS:
                raise ValueError(
                    f"quantization={self.quantization!r}: expected {' or '.join(map(repr, BITS))}, or a config of transformers."
                )
            require("bitsandbytes", f"quantization={self.quantization!r}")
            options["quantization_config"] = BitsAndBytesConfig(**BITS[self.quantization], bnb_4bit_compute_dtype=dtype)
        elif self.quantization is not None:
            options["quantization_config"] = self.quantization
        return options


def require(package: str, purpose: str) -> None:
    """Raise ImportError, with the command to install it, if a package that is needed to load big models is not installed.

    Args:
        package: Name of the package, such as ``"accelerate"``.
        purpose: Name of the option or method that needs the package, for the error message.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{purpose} needs {package}: pip install 'reasoning-length-toolkit[big]'.")


def read(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    placement: Placement = Placement(),
) -> Checkpoint:
    """Read a model and its tokenizer. An adapter is merged into its base model.

    Args:
        source: Directory, hub id, GGUF file, or name of a model that comes with the toolkit (``"tiny-reasoner"``, ``"smol-reasoner"``).
        revision: Hub revision (branch, tag or commit).
        dtype: Dtype of the weights.
        trust_remote_code: True to run code from the hub repository.
        placement: Where and how the weights are stored.

    Raises:
        FileNotFoundError: there is no directory or GGUF file at the path.
        ImportError: a package that the model or the placement needs is not installed; the message says which.
        ValueError: the quantisation is unknown.
        store.DamagedFileError: a file is truncated or damaged.
        UnsupportedModelError: the files are not those of one complete causal language model, or the placement does not work for them.
    """
    checkpoint = _read(source, dtype, {"revision": revision, "trust_remote_code": trust_remote_code}, placement)
    # Not ``model.to``, which transformers refuses for some models. With a device map, every module is where it is to be already.
    if placement.device_map is None and not tensors.storage(checkpoint.model):
        torch.nn.Module.to(checkpoint.model, placement.device)
    return checkpoint


def _read(
    source: str | Path, dtype: torch.dtype, common: Mapping[str, Any], placement: Placement, above: tuple[Path, ...] = ()
) -> Checkpoint:
    """Read a model as ``read`` does, without moving it to its device at the end.

    Args:
        common: Arguments for every ``from_pretrained``: ``revision`` and ``trust_remote_code``.
        above: Directories of the adapters whose base is being read, outermost first. An adapter's base may be an adapter too; if it is one
            of these, the adapters form a cycle, which is an error.
    """
    revision = common["revision"]
    if source == SMOL_REASONER:
        _check_whole(SMOL_REASONER, placement)
        adapter = shipped.path_of(SMOL_REASONER)
        model, tokenizer = _gguf(shipped.smollm2_path(), torch.float32, common, Placement())
        tokenizer.chat_template = shipped.template(adapter)
        return Checkpoint(shipped.merge(model, adapter, dtype), tokenizer)
    path = shipped.path_of(str(source)) if source in shipped.COMPLETE else Path(source)
    if path.suffix == ".gguf":
        return Checkpoint(*_gguf(path, dtype, common, placement))
    if not path.exists() and (path.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1):
        raise FileNotFoundError(f"{path} is neither a directory nor a GGUF file, and not a hub id (owner/name).")
    where = str(path if path.exists() else source)
    if not path.exists():
        repositories.check_exists(where, revision)
    if (config := _foreign(where, lambda: adapters.read_config(where, revision))) is not None:
        _check_whole(where, placement)
        return _adapted(where, config, dtype, common, above)
    model, tokenizer = _plain(where, dtype, common, placement)
    folder = None if source in shipped.COMPLETE else _folder(where, revision, model)
    return Checkpoint(model, tokenizer, folder, _made_from(where, revision))


def _check_whole(where: str, placement: Placement) -> None:
    """Raise UnsupportedModelError if the adapter ``where`` would be merged into weights that are quantised or on several devices."""
    if not placement.plain:
        raise UnsupportedModelError(
            f"{where} is an adapter, which can be merged only into plain weights on one device. Save the merged model first, "
            "lm.load(adapter).save(directory), and load that directory with device_map or quantization."
        )


def _made_from(where: str, revision: str | None) -> tuple[origins.Record, ...]:
    """Return the records (see ``origins``) of the problems that a saved model was edited or trained with.

    They are read from ``made_from.json`` beside the weights, in a directory or hub repository. Without this file, the result is empty.
    """
    path = Path(where) / MADE_FROM if Path(where).is_dir() else cached_file(where, MADE_FROM, revision=revision, **QUIET)
    if path is None or not Path(path).is_file():
        return ()
    return tuple(store.read_json(path, list[origins.HINT], remedy="Remove the file, or edit or train the model again."))


def write(checkpoint: Checkpoint, directory: str | Path, notes: Mapping[str, Any]) -> Path:
    """Write a checkpoint as an ordinary Hugging Face directory, atomically, and return its path.

    The other files in ``checkpoint.folder`` are copied too, except weights and files that describe the old weights (``DESCRIBES``).

    Args:
        checkpoint: Model and tokenizer to write. Its field ``made_from`` is written only if the caller adds it to ``notes``.
        directory: The new directory.
        notes: JSON files to add: file name -> content.

    Raises:
        FileExistsError: the directory exists and is not empty.
    """
    with store.atomic_directory(directory) as partial:
        checkpoint.model.save_pretrained(partial)
        checkpoint.tokenizer.save_pretrained(partial)
        for name, value in notes.items():
            store.write_json(value, partial / name)
        if checkpoint.folder is not None and checkpoint.folder.is_dir():
            store.copy_files(checkpoint.folder, partial, lambda name: not (WEIGHT_FILE.search(name) or DESCRIBES.match(name)))
    return Path(directory)


def _foreign(where: str, read: Any) -> Any:
    """Return the result of ``read()``. Turn its errors into an UnsupportedModelError with a message of one line.

    These errors are passed on unchanged: ImportError, StoreError, UnsupportedModelError, out of memory, KeyboardInterrupt, SystemExit.

    Args:
        where: Directory, file or hub id that is read, for the message.
        read: Function that reads it with another library.
    """
    try:
        return read()
    except (
        ImportError,
        store.StoreError,
        UnsupportedModelError,
        torch.OutOfMemoryError,
        MemoryError,
        KeyboardInterrupt,
        SystemExit,
    ):
        raise
    except BaseException as error:  # panics of the tokenizers library are not derived from Exception
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{where} needs code from its repository, which runs only if you allow it: --trust-remote-code, or "
                "lm.load(..., trust_remote_code=True)."
            ) from error
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise UnsupportedModelError(f"{where} cannot be loaded as a causal language model ({reason}).") from error


def _plain(
    where: str, dtype: torch.dtype, common: Mapping[str, Any], placement: Placement
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    local = Path(where).is_dir()
    if (path := _on_disk(where, common["revision"])) is not None:
        _check_files(path, partial=not local)

    def load() -> tuple[Any, Any, Any]:
        tokenizer = AutoTokenizer.from_pretrained(where, **common)
        config = AutoConfig.from_pretrained(where, **common)
        options = {**common, **placement.options(config, dtype)}
        loaded: Any = _auto_class(config).from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
        return tokenizer, *loaded

    tokenizer, model, report = _foreign(where, load)
    if not local and (path := _on_disk(where, common["revision"])) is not None:
        _check_files(path)  # files that were there before the download may have been incomplete, or another version
    _check_report(where, report)
    return model, tokenizer


def _auto_class(config: Any) -> Any:
    """Return the class of transformers that loads the whole model. For a multimodal model it loads all parts, not only the text part."""
    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if multimodal in (config.architectures or ()) or (multimodal and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _on_disk(where: str, revision: str | None) -> Path | None:
    """Return the directory of a model's files: ``where`` itself, or the cached snapshot of a hub id. ``None`` if nothing is cached.

    Nothing is downloaded.
    """
    if Path(where).is_dir():
        return Path(where)
    config = _foreign(where, lambda: cached_file(where, "config.json", revision=revision, local_files_only=True, **QUIET))
    return Path(config).parent if config else None


def _gguf(
    path: Path, dtype: torch.dtype, common: Mapping[str, Any], placement: Placement
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if placement.device_map is not None:
        raise UnsupportedModelError(f"{path} is a GGUF file, which is loaded on one device: leave device_map out.")
    if isinstance(placement.quantization, str):
        raise UnsupportedModelError(
            f"{path} is a GGUF file, which bitsandbytes cannot quantise. Leave quantization out to unpack its weights, or pass GgufConfig() of "
            "transformers to keep them packed."
        )
    if not path.is_file():
        raise FileNotFoundError(f"No GGUF file at {path}.")
    where, options = str(path.parent), {**common, "gguf_file": path.name}
    packing = versions.unpacked_gguf() if placement.quantization is None else {"quantization_config": placement.quantization}

    def load() -> tuple[Any, Any, Any]:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True, **options, **packing)
        return tokenizer, *loaded

    tokenizer, model, report = _foreign(str(path), load)
    _check_report(str(path), {**report, "unexpected_keys": ()})
    if getattr(packing.get("quantization_config"), "dequantize", True):  # transformers sets it, too, where it has no kernel
        # The weights are plain now, but transformers still marks them as quantised and would not save or train them.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model, tokenizer


def _adapted(
    where: str, config: Mapping[str, Any], dtype: torch.dtype, common: Mapping[str, Any], above: tuple[Path, ...]
) -> Checkpoint:
    """Read an adapter and its base model, and return the merged model. The base may itself be an adapter.

    The tokenizer is the adapter's if it has one, else the base's. ``folder`` is that of the base.

    Args:
        where: Directory or hub id of the adapter.
        config: Content of its ``adapter_config.json``.
        common: Arguments for every ``from_pretrained``.
        above: Directories of the adapters that have this adapter as their base, directly or indirectly; used to detect a cycle.
    """
    if (Path(where) / "config.json").is_file():  # transformers would load the model and wrap it in the adapter
        raise UnsupportedModelError(
            f"{where} holds a complete model and an adapter: move adapter_config.json and the adapter's weights to another directory, "
            "and load either directory."
        )
    name = str(config.get("base_model_name_or_path"))
    source = name if name in shipped.WEIGHTS else adapters.find_base(where, config)
    above = (*above, Path(where).resolve())
    if Path(source).resolve() in above:
        raise UnsupportedModelError(
            f"{where} is an adapter of {source}, which is an adapter of {where}: set base_model_name_or_path in adapter_config.json to a "
            "complete model."
        )
    base = _read(source, torch.float32, {**common, "revision": config.get("revision")}, Placement(), above)
    if tensors.storage(base.model):
        raise UnsupportedModelError(
            f"{where} is an adapter of {source}, whose weights are quantised: it can be merged only into plain weights. Set "
            "base_model_name_or_path in adapter_config.json to the model before quantisation."
        )
    tokenizer = base.tokenizer
    if (Path(where) / "tokenizer_config.json").is_file():
        tokenizer = _foreign(where, lambda: AutoTokenizer.from_pretrained(where, **common))
    model = _foreign(where, lambda: adapters.merge(base.model, where, dtype, revision=common["revision"]))
    made_from = origins.distinct((*base.made_from, *_made_from(where, common["revision"])))
    return Checkpoint(model, tokenizer, base.folder, made_from)


def _folder(where: str, revision: str | None, model: PreTrainedModel) -> Path | None:
    """Return the directory of a model's files. For a hub id it is the cached snapshot.

    If the model is multimodal, the files of its processor are downloaded into the snapshot first, so that ``write`` can copy them.
    """
    if Path(where).is_dir():
        return Path(where).resolve()
    names = ["config.json", *(PROCESSORS if model.config.get_text_config() is not model.config else ())]
    paths = [cached_file(where, name, revision=revision, **QUIET) for name in names]
    return Path(paths[0]).parent if paths[0] else None


# --- checks of the files, before and after transformers loads them -------------------------------------------


def _check_files(path: Path, *, partial: bool = False) -> None:
    """Raise an error unless the config and weights in a directory are valid: JSON and safetensors files, with each weight in one file only.

    Args:
        path: The directory.
        partial: True if missing shards are no error, because loading will download them.
    """
    objects = {name: store.read_json(path / name, Mapping[str, Any]) for name in OBJECTS if (path / name).is_file()}
    config, tensors = objects.get("config.json", {}), _headers(path, partial)
    if tensors and "quantization_config" not in config:
        odd = [f"{name} ({kind})" for name, (kind, _) in tensors.items() if kind not in FLOATS and not HARMLESS.search(name)]
        if odd:
            raise UnsupportedModelError(
                f"{path}: weight {odd[0]} is not stored as floating-point numbers: save the checkpoint again."
            )
    for name, value in _counts(config):
        # Each layer has at least one tensor, so there cannot be more layers than tensors.
        most = min(MODULES, len(tensors) or MODULES) if name == "num_hidden_layers" else MODULES
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most):
            raise UnsupportedModelError(
                f"{path}/config.json: {name} is {str(value)[:40]!r}, expected a whole number of at most {most}: copy the config again."
            )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, value)`` for every entry of a config, or of a config inside it, that is a number of layers, heads or experts.

    If an entry is a list with one number per layer, every number is yielded.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif re.fullmatch(r"(num|n)_.*(layers?|heads?|experts)", name):
            yield from (
                ((name, each) for each in value) if name.endswith("_per_layer") and isinstance(value, list) else [(name, value)]
            )


def _headers(path: Path, partial: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return ``{name: (dtype, shape)}`` for all tensors in the safetensors files that will be loaded.

    The result is empty if shards are still to be downloaded, or the weights are not in safetensors files.
    """
    if (path / WEIGHTS).is_file():
        return store.read_headers(path / WEIGHTS)
    for index in (INDEX, "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            shards = _shards(path, index, partial)
            return _merged_headers(shards) if index == INDEX else {}
    return {}


def _shards(path: Path, index: str, partial: bool) -> list[Path]:
    """Return the paths of the shards that an index file lists; empty if some are still to be downloaded.

    Args:
        path: Directory of the index and the shards.
        index: Name of the index file.
        partial: True if missing shards are no error, because loading will download them.

    Raises:
        store.DamagedFileError: the index lists no shards.
        UnsupportedModelError: a shard is outside the directory, or is missing.
    """
    weight_map = store.read_json(path / index, Mapping[str, Any]).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names:
        raise store.DamagedFileError(f"{path / index} names no files: expected a weight_map from weights to files. Copy it again.")
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
            raise UnsupportedModelError(f"{path / index} names {name[:80]!r}, a file outside its directory: refused.")
        if not (path / name).is_file() and not partial:
            raise UnsupportedModelError(f"{path / index} names {name[:80]!r}, which is missing: copy the checkpoint again.")
    shards = [path / name for name in names]
    return shards if all(shard.is_file() for shard in shards) else []


def _merged_headers(shards: list[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    merged: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards:
        headers = store.read_headers(shard)
        if both := sorted(merged.keys() & headers.keys()):
            raise UnsupportedModelError(
                f"{shard} holds the weight {both[0]}, which another file of the checkpoint holds too: remove one of them."
            )
        merged |= headers
    return merged


def _check_report(where: str, report: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if transformers initialised, dropped or could not convert a weight when it loaded a model.

    Args:
        where: Directory, file or hub id of the model, for the message.
        report: Loading info from ``from_pretrained``.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModelError(
            f"{where} lacks {len(missing)} weights, such as {', '.join(missing[:5])[:200]}: it is not complete. Copy it again."
        )
    extra = sorted(name for name in report["unexpected_keys"] if not HARMLESS.search(name))
    if extra:
        raise UnsupportedModelError(
            f"{where} holds weights that the model of its config.json does not have, such as {', '.join(extra[:3])[:150]} "
            f"({len(extra)} in all): use the config that belongs to them, or remove them."
        )
    if wrong := sorted(map(str, [*report.get("mismatched_keys", ()), *report.get("error_msgs", ())])):
        raise UnsupportedModelError(
            f"{where} holds weights that do not fit its config.json: {wrong[0][:150]} ({len(wrong)} in all)."
        )
