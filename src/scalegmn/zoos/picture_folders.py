"""What the folders around pictures stand for: classes, and the parts of a split."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from scalegmn.reporting.files import natural_order
from scalegmn.reporting.words import counted
from scalegmn.zoos.zoo_format import SPLIT_NAMES

ORDER = {"train": 0, "val": 1, "test": 2}
"""The order of the pictures of a split folder: those of the training folder come first."""

_NO_SPLIT = "rename the folders if they are no split"

_SPLIT_FOLDER = re.compile(
    rf"(.*[^a-z])?({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})([^a-z].*|set|images|data)?", re.IGNORECASE
)
"""`test`, and in a few words `seg_test`, `test_set`, `testset`, `test2017`."""


@dataclass(frozen=True)
class PictureFolders:
    """Where pictures belong by the folders that they are in.

    A picture's class is the folder that it is in. Folders of a split are around the folders of classes
    (`train/cat/1.png`), in them (`cat/train/1.png`), or around pictures without classes (`train/1.png`). Their names
    are `train` (`training`), `val` (`valid`, `validation`) and `test` (`testing`), or differ in such a word alone
    (`seg_train`, `seg_test`).

    Attributes:
        path: the folder of all.
        splits: `train`, `val` or `test` of each picture; empty: folders are no split.
        of_class: the folder of each picture's class; `.` where there are no classes.
        around: the folders in which those of a split are, even if only one of these has pictures.
        folders: all folders, those without pictures too.
    """

    path: Path
    splits: dict[PurePosixPath, str]
    of_class: dict[PurePosixPath, PurePosixPath]
    around: frozenset[PurePosixPath]
    folders: frozenset[PurePosixPath]

    @classmethod
    def recognise(cls, path: Path, names: Sequence[PurePosixPath], folders: set[PurePosixPath]) -> PictureFolders:
        """The folders around pictures of these names.

        Raises:
            ValueError: only some pictures are in the folders of a split, or in the folder of a class, or a split has
                none for training.
        """
        of_class = {name: name.parent for name in names}
        words = split_words({folder for name in names for folder in name.parts[:-2]})
        inner = {name: [folder for folder in name.parent.parents if folder.name in words] for name in names}
        splits = {name: words[split_folders[0].name] for name, split_folders in inner.items() if split_folders}
        around = {folder.parent for split_folders in inner.values() for folder in split_folders}
        if splits:
            _check_splits(path, splits, sorted({*names} - {*splits}))
            several = len({*splits.values()}) > 1
            return cls(path, splits if several else {}, of_class, frozenset(around), frozenset(folders))
        words = split_words({parent.name for parent in of_class.values()})
        if {"train"} < {*words.values()} and all(parent.name in words for parent in of_class.values()):
            splits = {name: words[parent.name] for name, parent in of_class.items()}
            around = {parent.parent for parent in of_class.values()}
            of_class = {
                name: parent.parent if len(around) > 1 else PurePosixPath() for name, parent in of_class.items()
            }
            return cls(path, splits, of_class, frozenset(around), frozenset(folders))
        at_top = sorted(name for name in names if not name.parent.parts)
        if at_top and len(at_top) < len(names):
            inside = min(name for name in names if name.parent.parts)
            raise ValueError(
                f"{path}: {at_top[0]} is in no class's folder ({len(at_top):,} in all), but {inside} is; move or "
                "remove it"
            )
        return cls(path, {}, of_class, frozenset(), frozenset(folders))

    def class_of(self, name: PurePosixPath) -> str:
        """The name of a picture's class; empty: there are no classes."""
        return _name(self.of_class[name])

    def classes(self) -> tuple[list[str], list[str]]:
        """The names of all classes in natural order, and those without pictures: folders beside those with some."""
        with_pictures = {*self.of_class.values()}
        places = {self._without_splits(folder.parent) for folder in with_pictures if folder.name}
        beside = {
            folder
            for folder in self.folders
            if folder.name and not self._is_split(folder) and self._without_splits(folder.parent) in places
        }
        used = {*map(_name, with_pictures)}
        classes = sorted(used | {*map(_name, beside)}, key=natural_order)
        return classes, [name for name in classes if name not in used]

    def notes(self) -> list[str]:
        """What folders were taken for, a sentence each."""
        notes, path = [], self.path
        places = sorted({*self.of_class.values()})
        if len({self._without_splits(place.parent) for place in places}) > 1:
            examples = ", ".join(map(str, places[:4])) + (", .." if len(places) > 4 else "")
            notes.append(f"{path}: a picture's class is the folder that it is in, and these are in several: {examples}")
        as_classes = sorted(split_words({place.name for place in places}), key=natural_order)
        if not self.around and len(as_classes) > 1:
            notes.append(f"{path}: {', '.join(as_classes)} are taken as classes, since other folders are beside them")
        used = {parent for name in self.of_class for parent in name.parents}
        unused = sorted(str(folder) for folder in self.folders - used if self._is_split(folder))
        if unused:
            notes.append(f"{path}: no pictures in {', '.join(unused)}; what a split lacks is drawn from the others")
        if self.splits:
            notes += self._notes_on_splits(self.splits)
        return notes

    def _notes_on_splits(self, splits: Mapping[PurePosixPath, str]) -> list[str]:
        """How many pictures they have, and what is no training picture's class."""
        counts = Counter(splits.values())
        sizes = ", ".join(f"{split} ({counted(counts[split], 'picture')})" for split in ORDER if counts[split])
        notes = [f"{self.path}: found the folders of a split, {sizes}; networks are split as their pictures are"]
        trained = {self.class_of(name) for name, split in splits.items() if split == "train"}
        unseen = sorted({*map(self.class_of, splits)} - trained, key=natural_order)
        if unseen:
            notes.append(
                f"{self.path}: no training picture of {', '.join(unseen)}; check the names of the classes' folders"
            )
        return notes

    def _is_split(self, folder: PurePosixPath) -> bool:
        """Whether a folder is one of a split's."""
        return folder.parent in self.around and folder.name in self._words

    @cached_property
    def _words(self) -> dict[str, str]:
        """The names of folders that can stand for a split."""
        return split_words({folder.name for folder in self.folders})

    def _without_splits(self, folder: PurePosixPath) -> PurePosixPath:
        """A folder's place in any of a split's folders."""
        path = [folder, *folder.parents][-2::-1]  # from the outermost on
        return PurePosixPath(*(step.name for step in path if not self._is_split(step)))


def _check_splits(path: Path, splits: Mapping[PurePosixPath, str], outside: Sequence[PurePosixPath]) -> None:
    """Raises ValueError where pictures are outside of all folders of a split, or none are for training."""
    kinds = " and ".join(sorted({*splits.values()}, key=ORDER.__getitem__))
    if outside:
        raise ValueError(
            f"{path}: found folders {kinds} of a split, and {outside[0]} in no class of one of them "
            f"({len(outside):,} in all); move such pictures into one or elsewhere, or {_NO_SPLIT}"
        )
    if kinds == "val and test":
        raise ValueError(f"{path}: found folders {kinds} of a split, and none for training; {_NO_SPLIT}")


def split_words(folders: set[str]) -> dict[str, str]:
    """Those names of folders that stand for a split -> which: `test`, or `seg_test` if `seg_train` is there too."""
    matches = {name: match for name in folders if (match := _SPLIT_FOLDER.fullmatch(name))}
    rest = {name: (match[1] or "", match[3] or "") for name, match in matches.items()}
    splits = {name: SPLIT_NAMES[match[2].lower()] for name, match in matches.items()}
    several = {form for form in rest.values() if len({splits[name] for name in splits if rest[name] == form}) > 1}
    return {name: split for name, split in splits.items() if rest[name] == ("", "") or rest[name] in several}


def _name(folder: PurePosixPath) -> str:
    """A folder's name as all systems write it, where accents may be characters of their own."""
    return unicodedata.normalize("NFC", folder.name)
