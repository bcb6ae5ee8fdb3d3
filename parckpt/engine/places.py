"""Root's hold on the directories of one run: where it started, and where it saves now, which a callable may change."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from parckpt.core.manifest import Facts
from parckpt.engine.catalog import scan
from parckpt.engine.keeper import Keeper, ephemeral_before
from parckpt.errors import LockedError, StorageError
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["Places", "directories_of"]

log = logging.getLogger("parckpt")


def directories_of(fs: FileSystem, home: str, noted: Sequence[str]) -> list[str]:
    """The home of a run, then those of the noted directories (relative to home) that are still there."""
    paths = [os.path.normpath(os.path.join(home, path)) for path in noted]
    there = [path for path in paths if (stat := try_stat(fs, path)) is not None and stat.is_dir]
    return [home, *(path for path in there if path != home)]


class Places:
    """The run's directories. On root only; nothing here is collective.

    The run file of the first directory, its home, lists the others that the run has saved to. So a start that finds
    the home finds all of them, the newest checkpoint among them, and finishes what was under way in the last.

    Parameters
    ----------
    take : callable
        Takes hold of a directory: makes it if needed, locks it, recovers what is in it.
    home : str
        The directory that the run starts in.

    Attributes
    ----------
    present : Keeper
        Of where the run saves now.
    """

    def __init__(self, fs: FileSystem, take: Callable[[str], Keeper], home: str) -> None:
        self._fs, self._take = fs, take
        self._moved = True  # since the last publish, or nobody knows where that was
        self.home = self.present = take(home)
        try:
            self._recover_last()
        except BaseException:
            self.close()
            raise

    def directories(self) -> list[str]:
        """Home, then the others that are still there, the last used one last."""
        return directories_of(self._fs, self.home.directory, self.home.noted_directories())

    def _recover_last(self) -> None:
        """Finish what a crash left in the directory used last; in those before it nothing was under way."""
        for last in self.directories()[1:][-1:]:
            try:
                self._take(last).close()
            except LockedError as error:
                log.warning("nothing is finished or swept in %s, which another run holds: %s", last, error)

    def enter(self, directory: str) -> None:
        """Save to another directory from now on; the one before is given up, unless it is home.

        Raises
        ------
        LockedError, StorageError
            Nothing has changed then.
        """
        if directory == self.present.directory:
            return
        before = self.present
        self._moved = True
        if directory == self.home.directory:
            self.present = self.home
        else:
            # Before anything is written there: what is left by a crash must be found, and what is published.
            self.home.note_directory(os.path.relpath(directory, self.home.directory))
            self.present = self._take(directory)
        if before is not self.home:
            before.close()

    def leave_behind(self, published: Facts) -> None:
        """After a publish: what was to live until then may be in the directory before. Errors are only logged.

        The number that each directory keeps is its own, as in MindSpore.
        """
        if not self._moved:
            return
        self._moved = False
        home, *others = self.directories()
        # The last but one, if the present one is the last; home is never noted as used.
        for path in {home, *others[-2:]} - {self.present.directory}:
            try:
                if ephemeral_before(self._fs, path, published):
                    self._drop_ephemeral(path, published)
            except (LockedError, StorageError) as error:
                log.warning("ephemeral checkpoints in %s could not be deleted: %s", path, error)

    def _drop_ephemeral(self, path: str, published: Facts) -> None:
        keeper = self.home if path == self.home.directory else self._take(path)
        try:
            keeper.drop_ephemeral(published)
        finally:
            if keeper is not self.home:
                keeper.close()

    def highest_sequence(self) -> int:
        """Of everything published in this family, in any of the directories; 0 if nothing is."""
        found = [one for path in self.directories() for one in scan(self._fs, path, self.home.family)]
        return max((one.facts.sequence for one in found if one.facts), default=0)

    def note_start(self, run_id: str) -> None:
        """As `Keeper.note_start`, where the next start looks and where the run saves."""
        for keeper in {self.home, self.present}:
            keeper.note_start(run_id)

    def note_published(self, run_id: str, step: int) -> None:
        """As `Keeper.note_published`, where the next start looks and where the run saves."""
        for keeper in {self.home, self.present}:
            keeper.note_published(run_id, step)

    def close(self) -> None:
        """Give all up."""
        if self.present is not self.home:
            self.present.close()
        self.home.close()
