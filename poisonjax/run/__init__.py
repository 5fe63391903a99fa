"""A run's folder: its format, its one reader and its one writer."""

from poisonjax.run.folder import RunFolder, RunFolderError

__all__ = ["RunFolder", "RunFolderError"]
