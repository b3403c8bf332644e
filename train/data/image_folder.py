"""Image files in folders, one a class, or with the labels that EDM's and StyleGAN's tools write."""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path, PurePath
from typing import Literal, NoReturn

from scalelong.train.data.archives import refuse_archives
from scalelong.train.data.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from scalelong.train.data.tar_shards import DESCRIPTION, MAX_CLASSES, whole_number
from scalelong.train.errors import UserError

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


class NoClassFoldersError(UserError):
    """Images stand in a folder itself, not in class folders, although labels are wanted."""


class ImageFolder:
    """Image files in class folders: ``root/<class>/**/*.png``, classes numbered in sorted order.

    Where ``dataset.json`` holds ``labels``, pairs of an image's path and its class, those count instead of the folders.
    Without labels, every image below ``root``. Links are followed.

    Raises:
        UserError: no such folder, no images in it, or class folders missing although labels are wanted; or what would
            be left out or numbered wrongly: a folder that cannot be read, a broken link, train/ beside val/.
    """

    holds: Literal["images"] = "images"

    def __init__(self, root: str | Path, *, labelled: bool = True):
        self.root = Path(root)
        if not self.root.is_dir():
            refuse_archives(self.root)
            raise UserError(f"no such folder of images: {self.root}")
        label_of = _read_labels(self.root) if labelled else None
        if label_of is not None:
            self._paths = _image_files(self.root)
            self._labels = self._labels_from(label_of)
            self.class_names = [str(label) for label in range(max(self._labels) + 1)] if label_of else []
        elif labelled:
            found = [(folder.name, _image_files(folder)) for folder in _class_folders(self.root)]
            found = [(name, paths) for name, paths in found if paths]
            names = [name for name, _ in found]
            if len(names) > 1 and SPLITS.issuperset(map(str.lower, names)):
                one = self.root / names[0]
                raise UserError(f"{self.root} holds {' and '.join(names)}, not classes: take one, --data.path {one}")
            if not found and _image_files(self.root):
                problem = f"{self.root} has images but no class folders; a model with labels needs one per class"
                raise NoClassFoldersError(problem)
            self.class_names = [_printable(name) for name in names]
            self._paths = [path for _, paths in found for path in paths]
            self._labels = [label for label, (_, paths) in enumerate(found) for _ in paths]
        else:
            self.class_names = []
            self._paths = _image_files(self.root)
            self._labels = [0] * len(self._paths)
        if not self._paths:
            refuse_archives(self.root)
            raise UserError(f"no images in {self.root} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")

    def _labels_from(self, label_of: dict[str, int]) -> list[int]:
        if not label_of:
            return [0] * len(self._paths)
        names = [path.relative_to(self.root).as_posix() for path in self._paths]
        for missing, what in ((set(names) - label_of.keys(), "label"), (label_of.keys() - set(names), "image")):
            if missing:
                path = self.root / DESCRIPTION
                raise UserError(f"{path}: {_printable(min(missing))} has no {what}, as {len(missing) - 1:,} others")
        return [label_of[name] for name in names]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        return self._paths[index].read_bytes()

    def label(self, index: int) -> int:
        return self._labels[index]

    def key(self, index: int) -> str:
        return _printable(str(self._paths[index]))

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(os.fsencode(f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n"))
        if (label_of := _read_labels(self.root)) and self.class_names:
            digest.update(json.dumps(sorted(label_of.items())).encode())
        return digest.hexdigest()


def _class_folders(root: Path) -> list[Path]:
    try:
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        for path in entries:
            if path.is_symlink() and not path.exists():
                raise UserError(f"{_printable(str(path))} is a link to what is not there")
        return [path for path in entries if path.is_dir()]
    except OSError as error:
        _cannot_read(error)


def _image_files(folder: Path) -> list[Path]:
    """Those in the folder and below, links followed, in sorted order."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_read):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            _check_leads_on(Path(place, name))
        for name in names:
            suffix = PurePath(name).suffix.lower()
            if name.startswith(".") or suffix not in IMAGE_SUFFIXES | UNREAD_SUFFIXES:
                continue
            path = Path(place, name)
            if path.is_symlink() and not path.exists():
                raise UserError(f"{_printable(str(path))} is a link to what is not there")
            if suffix in UNREAD_SUFFIXES:
                raise UserError(f"{_printable(str(path))}: {suffix} files are not read; convert them to PNG or JPEG")
            if path.is_file():
                found.append(path)
    return sorted(found)


def _check_leads_on(folder: Path) -> None:
    """Raises UserError for a link to a folder that the link itself lies in."""
    if folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{_printable(str(folder))} is a link to a folder that it lies in")


def _cannot_read(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {_printable(str(error.filename))}: {error.strerror}") from error


def _read_labels(root: Path) -> dict[str, int] | None:
    """Label by path as ``dataset.json`` gives them; empty where it says that there are none, None where nothing."""
    path = root / DESCRIPTION
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or "labels" not in found:
            return None
        label_of = {str(name): whole_number(label) for name, label in found["labels"] or []}
        if not all(0 <= label < MAX_CLASSES for label in label_of.values()):
            raise ValueError("a label is no whole number from 0 on")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return label_of


def _printable(name: str) -> str:
    """A path as text, even one that is no UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")
