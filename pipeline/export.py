"""Models of any kind as folders for others: converted, with a card, and uploaded to the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from pipeline import arguments, storage, tracking, trained
from pipeline.config.load import parse_section
from pipeline.config.location import HUB
from pipeline.config.schema import ExportConfig, ImportConfig, RunConfig
from pipeline.errors import ConfigError, did_you_mean
from pipeline.models import model_folder
from pipeline.models.model_card import card
from pipeline.models.model_folder import Background
from pipeline.storage import hub


def export_model(source: str | Path, destination: str, words: Sequence[str] = ()) -> str | None:
    """Write a model folder with configs, tokenizer and a card, and upload it where `push` names a repository.

    Args:
        source: a path or name as for `load_model`.
        destination: folder or URL, written as a whole or not at all; replaces an earlier model there.
        words: `license=NAME`, `figures.NAME=VALUE`, `push=OWNER/NAME` and `private=false`, see
            `ExportConfig`, and the overrides of `load_model`.

    Returns:
        The address of the repository that the folder was uploaded to; None without `push`.

    Raises:
        ConfigError: a wrong word, a destination that holds something other than a model, or a repository that
            cannot be written, which is found out before anything is converted.
        CheckpointError: as `load_model`.
        CapabilityError: as `load_model`.
    """
    arguments.instance("words", words, list, tuple)
    names = storage.listing(destination)
    if names and not {model_folder.WEIGHTS, model_folder.CONFIG} <= set(names):
        raise ConfigError(
            f"destination {destination!r} holds {', '.join(names[:5])}; expected a new folder or a model's"
        )
    keys = {word: word.partition("=")[0].partition(".")[0] for word in words}
    known = [*ExportConfig.model_fields, *ImportConfig.model_fields, "base"]
    for word, key in keys.items():
        if key not in known:
            raise ConfigError(f"{word!r}: no such key{did_you_mean(key, known)}; known: {', '.join(known)}")
    of_export = [word for word in words if keys[word] in ExportConfig.model_fields]
    settings = parse_section(ExportConfig, {}, "export", of_export)
    if settings.push is not None:
        hub.check_upload(settings.push)
    local, origin = trained.find(str(source), tracking.tracking_uri(RunConfig(name="any")))
    model = trained.read(local, [word for word in words if word not in of_export])
    figures = {**model.background.figures, **settings.figures}
    size = sum(value.numel() for value in model.denoiser.state_dict().values())
    origin = origin if origin.startswith(HUB) else Path(source).name
    about = (model.config, model.facts, size, figures, settings.license, origin)
    text = card(Path(destination).name, *about, settings.push)
    with storage.publishing_folder(destination) as folder:
        # The paths of the files and logs of a run are not published.
        run = {k: v for k, v in model.background.run.items() if k not in ("cluster", "tracking")}
        model.write(folder, Background(figures, run))
        (folder / "README.md").write_text(text, encoding="utf-8")
    if settings.push is None:
        return None
    return hub.upload(storage.fetch(destination), settings.push, settings.private)
