"""Image files in folders, one a class."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Literal

from scalelong.train.data.images import IMAGE_SUFFIXES
from scalelong.train.errors import UserError


class ImageFolder:
    """Image files in class folders: ``root/<class>/**/*.png``, classes numbered in sorted order.

    Without labels, every image below ``root``.

    Raises:
        UserError: no such folder, no images in it, or class folders missing although labels are wanted.
    """

    holds: Literal["images"] = "images"

    def __init__(self, root: str | Path, *, labelled: bool = True):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"no such folder of images: {self.root}")
        if labelled:
            folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
            found = [(folder.name, _image_files(folder)) for folder in folders]
            found = [(name, paths) for name, paths in found if paths]
            if not found and _image_files(self.root):
                raise UserError(f"{self.root} has images but no class folders; a model with labels needs one per class")
            self.class_names = [name for name, _ in found]
            self._paths = [path for _, paths in found for path in paths]
            self._labels = [label for label, (_, paths) in enumerate(found) for _ in paths]
        else:
            self.class_names = []
            self._paths = _image_files(self.root)
            self._labels = [0] * len(self._paths)
        if not self._paths:
            raise UserError(f"no images in {self.root} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        return self._paths[index].read_bytes()

    def label(self, index: int) -> int:
        return self._labels[index]

    def key(self, index: int) -> str:
        return str(self._paths[index])

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n".encode())
        return digest.hexdigest()


def _image_files(folder: Path) -> list[Path]:
    def counts(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file()

    return sorted(path for path in folder.rglob("*") if counts(path))
