"""The models of an engine: which are loaded, as what, and on whose behalf."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from erllama_core.config import ModelConfig
from erllama_core.errors import AlreadyLoaded, EngineClosed, ModelNotFound, unknown_name
from erllama_core.model.model import Model, ModelRef


class ModelTable:
    """Loaded models by their ids. Thread-safe; nothing here waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, Model] = {}
        self._configs: dict[str, ModelConfig] = {}
        self._named: set[str] = set()
        self._loading: set[str] = set()
        self._leaving: set[Model] = set()
        self._closed = False

    # ----------------------------------------------------------------- loading

    def claim(self, name: str) -> None:
        """A model is about to be loaded under an id. Raises AlreadyLoaded."""
        with self._lock:
            if name in self._models or name in self._loading:
                raise AlreadyLoaded(f"a model is loaded as {name!r}; unload it or use another id")
            self._loading.add(name)

    def unclaim(self, name: str) -> None:
        """It is loaded, or will not be."""
        with self._lock:
            self._loading.discard(name)

    def add(self, model: Model, config: ModelConfig) -> None:
        """A model is loaded. Raises EngineClosed when the table was closed meanwhile."""
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine was closed while the model was loading")
            self._models[model.id] = model
            self._configs[model.id] = config

    def take(self, model: ModelRef) -> Model | None:
        """Take a model out, to be closed and then forgotten; None when it is not there."""
        name = model if isinstance(model, str) else model.id
        with self._lock:
            found = self._models.get(name)
            if found is None or (isinstance(model, Model) and found is not model):
                return None
            del self._models[name]
            self._configs.pop(name, None)
            self._named.discard(name)
            self._leaving.add(found)
            return found

    def forget(self, model: Model) -> None:
        """A model that was taken out is closed."""
        with self._lock:
            self._leaving.discard(model)

    # ----------------------------------------------------------------- looking

    def all(self) -> list[Model]:
        """Every loaded model."""
        with self._lock:
            return list(self._models.values())

    def find(self, model: ModelRef) -> Model | None:
        """The model loaded under an id, or that very model; None when it is not loaded."""
        name = model if isinstance(model, str) else model.id
        with self._lock:
            found = self._models.get(name)
        return found if isinstance(model, str) or found is model else None

    def get(self, name: str) -> Model:
        """The model loaded under an id. Raises ModelNotFound."""
        with self._lock:
            found = self._models.get(name)
            loaded = list(self._models)
        if found is None:
            raise ModelNotFound(unknown_name("model", name, loaded))
        return found

    # ----------------------------------------------------------- configurations

    @property
    def named(self) -> frozenset[str]:
        """Ids of models that are loaded because the engine's configuration names them."""
        with self._lock:
            return frozenset(self._named)

    def note_named(self, names: Iterable[str]) -> None:
        """These, of the ones that are loaded, are in the engine's configuration."""
        with self._lock:
            self._named.update(name for name in names if name in self._models)

    def configs(self) -> dict[str, ModelConfig]:
        """What each loaded model was loaded with, or has become since."""
        with self._lock:
            return dict(self._configs)

    def set_configs(self, configs: Mapping[str, ModelConfig]) -> None:
        """What holds of these models now; of those that are gone, nothing."""
        with self._lock:
            self._configs.update(
                {name: config for name, config in configs.items() if name in self._models}
            )

    # --------------------------------------------------------------- lifecycle

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> list[Model]:
        """Take no more models; those that are to be closed, or are being closed by others."""
        with self._lock:
            self._closed = True
            return [*self._models.values(), *self._leaving]

    def clear(self) -> None:
        """All of them are closed."""
        with self._lock:
            self._models.clear()
            self._configs.clear()
