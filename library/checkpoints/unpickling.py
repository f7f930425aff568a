"""Reads pickles that others wrote without importing or running anything that they name.

Checkpoints of training frameworks hold more than tensors: callbacks, schedules, settings. What the tensors need is
rebuilt by functions of ours; everything else that a pickle names becomes an empty stand-in. So no name in a file leads
to code, whatever the file says: the safety does not rest on a list of bad names.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from library.errors import UserError
from library.runtime.files import open_regular

_ORDINARY = ("torch", "numpy", "collections")  # packages that need no mention: every checkpoint names them
# What no checkpoint needs, and hostile files use. It would become a stand-in like all else; but whoever has such a
# file should know.
_HOSTILE_MODULES = frozenset(
    ["os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "ctypes", "pty"]
)
_HOSTILE_FUNCTIONS = frozenset(["eval", "exec", "compile", "__import__", "open", "input", "breakpoint"])
_BUILTINS = ("builtins", "__builtin__", "io", "_io")
_ZIP = b"PK\x03\x04"


class HostilePickle(Exception):
    """A file that names what would run commands; the message is that name."""


class _Fixed(type):
    """Classes that a pickle can call, but not change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError("a pickle may not change this")


class StandIn(metaclass=_Fixed):
    """An empty stand-in for instances of other classes, and for results of other functions, in a pickle."""

    __slots__ = ()

    def __new__(cls, *_args: Any, **_kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_kwargs: Any) -> StandIn:
        return StandIn()

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _item: Any) -> None:
        pass

    def extend(self, _items: Any) -> None:
        pass

    def add(self, _item: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor in a pickle."""

    dtype: str  # the name of torch's storage class, such as HalfStorage
    shape: tuple[int, ...]


class SafeUnpickler(pickle.Unpickler):
    """Knows the names in `known`, each "module.name"; all others become stand-ins and are listed in `unknown`."""

    def __init__(self, file: IO[bytes], known: dict[str, Any], unknown: list[str] | None = None, **options: Any):
        super().__init__(file, **{"encoding": "utf-8", "errors": "surrogateescape"} | options)
        self._known = {"collections.OrderedDict": OrderedDict, **known}
        self.unknown = [] if unknown is None else unknown

    def find_class(self, module: str, name: str) -> Any:
        """Raises: HostilePickle: a name by which a hostile file gives itself away."""
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        hostile_function = module in _BUILTINS and name.partition(".")[0] in _HOSTILE_FUNCTIONS
        if hostile_function or module.partition(".")[0] in _HOSTILE_MODULES:
            raise HostilePickle(full)
        if module.partition(".")[0] not in _ORDINARY and full not in self.unknown:
            self.unknown.append(full)
        return StandIn


# --- with torch -------------------------------------------------------------------------------------------------------


def load_tolerant(path: Path) -> tuple[Any, list[str]]:
    """The content of a file of `torch.save`, on the CPU, and the names of the classes that were left out of it.

    Raises: UserError: a program. HostilePickle: see there. Whatever torch and pickle raise: a damaged file.
    """
    import torch

    unknown: list[str] = []

    def rebuild(storage: Any, offset: int, size: Any, stride: Any, *_others: Any) -> Any:
        return torch._utils._rebuild_tensor(storage, offset, tuple(size), tuple(stride))

    class Unpickler(SafeUnpickler):
        def __init__(self, file: IO[bytes], **options: Any):
            super().__init__(file, _rebuilding(rebuild), unknown, **options)

    class PickleModule:  # what torch.load takes in the place of Python's pickle
        UnpicklingError = pickle.UnpicklingError

        @staticmethod
        def load(file: IO[bytes], **options: Any) -> Any:
            return Unpickler(file, **options).load()

    PickleModule.Unpickler = Unpickler
    return load_torch(path, weights_only=False, pickle_module=PickleModule), unknown


def load_torch(path: Path, **options: Any) -> Any:
    """`torch.load` of a torch file of any name, on the CPU. Raises: UserError: a program. Whatever torch raises."""
    import torch

    zipped = is_zip(path)
    if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        # torch.load would hand it to TorchScript, which runs it.
        raise UserError(
            f"{path}: this is a TorchScript program, not a file of weights; get a file of the weights alone"
        )
    if path.name.endswith(".safetensors"):  # torch goes by the name, and gives it to the other library
        with open_regular(path) as file:
            return torch.load(file, map_location="cpu", **options)
    # mmap leaves what is not used on the disk; only the zip form, written since torch 1.6, can do it.
    return torch.load(path, map_location="cpu", mmap=zipped or None, **options)


def is_zip(path: Path) -> bool:
    """Whether torch would read the file as a zip archive. Raises: OSError: no regular file that may be read."""
    with open_regular(path) as file:
        return file.read(len(_ZIP)) == _ZIP


def _rebuilding(rebuild: Callable[..., Any]) -> dict[str, Any]:
    """The names that tensors need, and what is called for them; `rebuild` makes one of (storage, offset, size, ...)."""
    return {
        "torch._utils._rebuild_tensor": _called(rebuild),
        "torch._utils._rebuild_tensor_v2": _called(rebuild),
        "torch._utils._rebuild_parameter": _called(lambda data, *_: data),
        "torch._utils._rebuild_parameter_with_state": _called(lambda data, *_: data),
        "torch._tensor._rebuild_from_type_v2": _called(lambda make, _kind, args, _state: make(*args)),
        "torch.Size": _called(tuple),
    }


def _called(function: Callable[..., Any]) -> type:
    """A class that gives what `function` returns: unlike a function, the pickle cannot give it other defaults."""
    return _Fixed("Rebuilt", (), {"__slots__": (), "__new__": lambda _cls, *args: function(*args)})


# --- without torch ----------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    kind: str


def read_specs(path: Path) -> Any:
    """The content of a file of `torch.save`, with a `TensorSpec` for each tensor. Needs no torch, reads no elements.

    Raises: Exception of any kind: a damaged or hostile file, which reading the weights explains better.
    """
    if not is_zip(path):
        with open_regular(path) as file:
            for _ in range(3):  # a magic number, the version of the protocol, facts about the machine
                _SpecUnpickler(file).load()
            return _SpecUnpickler(file).load()
    with open_regular(path) as whole, zipfile.ZipFile(whole) as archive:
        name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        with archive.open(name) as file:
            return _SpecUnpickler(file).load()


class _SpecUnpickler(SafeUnpickler):
    def __init__(self, file: IO[bytes]):
        def spec(storage: Any, _offset: Any, size: Any, *_others: Any) -> TensorSpec:
            return TensorSpec(storage.kind, tuple(int(side) for side in size))

        super().__init__(file, _rebuilding(spec))

    def find_class(self, module: str, name: str) -> Any:
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        return _Storage(name) if is_storage else super().find_class(module, name)

    def persistent_load(self, saved_id: Any) -> Any:
        return saved_id[1]
