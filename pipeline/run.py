"""A run: the config of a job and everything that follows from it, resolved once at the head of the job."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pipeline import storage, tracking, trained
from pipeline.config.load import flatten
from pipeline.config.schema import DistillConfig, RunConfig
from pipeline.data.manifest import TOKENIZER, Manifest
from pipeline.data.prepare import prepare
from pipeline.data.tokenizers import Tokenizer, load_tokenizer
from pipeline.errors import CheckpointError
from pipeline.models import model_folder
from pipeline.runtime.actors import Resources


@dataclass(frozen=True)
class Run:
    """A job's config with its folders, its tracking store, and what the job has been given so far.

    Paths are derived from the config when they are first read, and always before the run is sent to a worker,
    whose environment may differ from the driver's.

    Attributes:
        config: with absolute folders, see `Run.of`.
        run_id: id of the MLflow run; None: metrics are not tracked.
        given_resources: see `resources`.
        given_manifest: see `manifest`.
    """

    config: RunConfig
    run_id: str | None = None
    given_resources: Resources | None = None
    given_manifest: Manifest | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Make the run of a config; relative folders become absolute, since workers run in other folders.

        Args:
            config: as the user wrote it.

        Returns:
            The run, without resources, data or MLflow run.
        """
        data = config.data.model_copy(update={"path": config.data.path and storage.resolve(config.data.path)})
        cluster = config.cluster.model_copy(update={"storage": storage.resolve(config.cluster.storage)})
        distill = config.distill
        if distill is not None and trained.is_path(distill.teacher):
            distill = distill.model_copy(update={"teacher": storage.resolve(distill.teacher)})
        return cls(config.model_copy(update={"data": data, "cluster": cluster, "distill": distill}))

    def replace(self, **changes: Any) -> Self:
        """Copy the run with some fields changed.

        Args:
            changes: fields with their new values.
        """
        return replace(self, **changes)

    def configured(self, **sections: Any) -> Self:
        """Copy the run with some sections of its config changed.

        Args:
            sections: of the config, with their new values.
        """
        return self.replace(config=self.config.model_copy(update=sections))

    @cached_property
    def folder(self) -> str:
        """Folder of the run: `cluster.storage`/name."""
        return storage.join(storage.resolve(self.config.cluster.storage), self.config.name)

    @cached_property
    def data_path(self) -> str:
        """Folder of the prepared data."""
        return prepare.data_path(self.config.data, storage.resolve(self.config.cluster.storage))

    @cached_property
    def tracking_uri(self) -> str:
        """Address of the MLflow store."""
        return tracking.tracking_uri(self.config)

    @property
    def model_folder(self) -> str:
        """Folder of the consolidated model that a finished run leaves."""
        return storage.join(self.folder, "model")

    @property
    def adapter_folder(self) -> str:
        """Folder of the adapter that a finished run with `model.lora` leaves beside the model."""
        return storage.join(self.folder, "adapter")

    @property
    def distill(self) -> DistillConfig:
        """The `distill` section of a distillation."""
        assert self.config.distill is not None
        return self.config.distill

    @property
    def resources(self) -> Resources:
        """What the cluster gives the job, once the job has joined it."""
        assert self.given_resources is not None
        return self.given_resources

    @property
    def manifest(self) -> Manifest:
        """Manifest of the data, once the data is prepared or checked."""
        assert self.given_manifest is not None
        return self.given_manifest

    def with_data(self) -> Self:
        """Copy the run with the manifest of its data, which is prepared first if it is missing.

        Raises:
            DataError: the data cannot be prepared, or its folder holds other data.
        """
        return self.replace(given_manifest=prepare.ensure(self.config.data, self.data_path))

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        """Tokenizer of the run's text, which lies beside its shards."""
        folder = storage.join(self.data_path, TOKENIZER)  # earlier versions kept none there
        return load_tokenizer(folder if storage.folder_complete(folder) else self.config.data.tokenizer)

    def find_model(self, key: str, name: str, kinds: str = trained.KINDS) -> tuple[Path, str]:
        """Find the model that a key of the config names, see `trained.find`.

        Args:
            key: of the config, for the message.
            name: of the model.
            kinds: of folders and files that can be named, for the message.

        Raises:
            CheckpointError: there is no such model.
        """
        return trained.find(name, self.tracking_uri, key, kinds)

    def sampled_model(self) -> str:
        """Find the model to sample: `sampling.model`, or the run's own.

        Returns:
            Model folder that all nodes can read. Released weights and models of the hub are placed in
            `cluster.storage`/imported first.

        Raises:
            CheckpointError: there is no such model, or it is damaged.
        """
        name = self.config.sampling.model
        if name is None:
            model = self.model_folder
            if not storage.folder_complete(model):
                how = "`python -m jobs.pretrain CONFIG` makes it"
                raise CheckpointError(
                    f"{model}: no such model folder; {how}, or sampling.model names another"
                )
        else:
            root = storage.join(storage.resolve(self.config.cluster.storage), "imported")
            model = trained.placed(name, self.tracking_uri, root, "sampling.model")
        if storage.is_local(model):  # a remote one is read by the workers, which copy it
            model_folder.read_config(Path(model))
        return model

    def tracker(self, folder: str | None = None, system_metrics: bool = False) -> tracking.Tracker:
        """Open a tracker of the run's MLflow run.

        Args:
            folder: that this job owns, for metrics that MLflow has not taken; None: the run's folder.
            system_metrics: sample this machine's CPU, memory and GPUs too.
        """
        assert self.run_id is not None
        folder = folder or self.folder
        # Beside a remote folder, on this node; two runs of one name in different folders are kept apart.
        digest = hashlib.sha256(folder.encode()).hexdigest()[:16]
        local = storage.is_local(folder)
        spill = Path(folder) if local else storage.node_folder() / "untracked" / digest
        spill.mkdir(parents=True, exist_ok=True)
        return tracking.Tracker(self.tracking_uri, self.run_id, spill / "untracked.jsonl", system_metrics)

    @contextmanager
    def in_mlflow(self) -> Iterator[Self]:
        """Give a copy of the run with the MLflow run of its folder; one is opened, and ended, where there is none.

        Raises:
            ConfigError: a new MLflow run is needed and the store cannot be reached.
        """
        if recorded := tracking.recorded_run(self.folder):
            yield self.replace(run_id=recorded[0])
            return
        config, uri = self.config, self.tracking_uri
        params = flatten(config.model_dump(mode="json"))
        experiment = config.tracking.experiment
        run_id = tracking.open_recorded_run(self.folder, uri, experiment, config.name, params, {})
        with tracking.ending(uri, run_id):
            yield self.replace(run_id=run_id)

    def __getstate__(self) -> dict[str, Any]:
        """Derive everything that depends on the driver's environment before the run goes to another process."""
        _ = self.folder, self.data_path
        if self.run_id is not None:
            _ = self.tracking_uri
        return self.__dict__
