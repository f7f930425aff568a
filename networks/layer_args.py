"""Arguments of the types of adapter layers. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from networks.arguments import ArgumentGroup, Reader
from networks.factors import factors, nearest_divisor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LayerArgs(ArgumentGroup):
    """What a type of layer is made with, beside its rank and alpha."""

    @classmethod
    def like(cls, other: LayerArgs) -> Self:
        """`other`, or where that is of another type, what both types have of it."""
        if isinstance(other, cls):
            return other
        return cls(**{field.name: getattr(other, field.name) for field in fields(cls) if hasattr(other, field.name)})

    def reads_gradients(self) -> str | None:
        """The argument that needs the gradients when the backward pass is over, where there is one."""
        return None

    def alpha_warnings(self, alpha: float, module: str) -> list[str]:
        """A warning where --network_alpha has a value that the type makes little of. Args: module: for messages."""
        return []


@dataclass(frozen=True)
class LoraArgs(LayerArgs):
    """Dropouts in [0, 1]: of ``down(x)``, of ranks, and of whole layers."""

    NAMES = ("dropout", "rank_dropout", "module_dropout")

    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None

    @classmethod
    def read(cls, reader: Reader) -> LoraArgs:
        return cls(**_dropouts(reader))


def _dropouts(reader: Reader) -> dict[str, float | None]:
    return {
        "dropout": reader.number("dropout", float, least=0, most=1),
        "rank_dropout": reader.number("rank_dropout", float, least=0, below=1),
        "module_dropout": reader.number("module_dropout", float, least=0, most=1),
    }


@dataclass(frozen=True)
class SplitLoraArgs(LoraArgs):
    """`split_qkv`: whether layers that are fused in files are trained in parts."""

    NAMES = (*LoraArgs.NAMES, "split_qkv")

    split_qkv: bool = False

    @classmethod
    def read(cls, reader: Reader) -> SplitLoraArgs:
        return cls(split_qkv=reader.flag("split_qkv"), **_dropouts(reader))


GGPO = ("ggpo_sigma", "ggpo_beta")


@dataclass(frozen=True)
class PerturbedLoraArgs(SplitLoraArgs):
    """Strengths of the perturbation in training (LoRA-GGPO): both are given, or none."""

    NAMES = (*SplitLoraArgs.NAMES, *GGPO)

    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None

    @classmethod
    def read(cls, reader: Reader) -> PerturbedLoraArgs:
        ggpo: dict[str, Any] = {name: reader.number(name, float, least=0) for name in GGPO}
        if len(ggpo.keys() & reader.args.keys()) == 1:
            given = next(name for name in GGPO if name in reader.args)
            reader.refuse(given, f"needs the other one too: {GGPO[0]} and {GGPO[1]}")
        return cls(split_qkv=reader.flag("split_qkv"), **_dropouts(reader), **ggpo)

    def reads_gradients(self) -> str | None:
        return None if self.ggpo_sigma is None else GGPO[0]


@dataclass(frozen=True)
class DyLoraArgs(LayerArgs):
    """`unit`: ranks that are trained together."""

    NAMES = ("unit",)

    unit: int = 1

    @classmethod
    def read(cls, reader: Reader) -> DyLoraArgs:
        return cls(unit=reader.number("unit", int, least=1) or 1)


@dataclass(frozen=True)
class ChangeArgs(LayerArgs):
    """Arguments of the types whose change is as large as the weight. A type has those of `NAMES`; the others are off.

    Dropouts are in [0, 1]; `rank_dropout` leaves out rows of the change, and divides the others by the kept share where
    `rank_dropout_scale` is set. `factor`: of LoKr's first matrix, -1 makes both as square as they can be.
    """

    dropout: float | None = None
    rank_dropout: float | None = None
    rank_dropout_scale: bool = False
    module_dropout: float | None = None
    use_tucker: bool = False  # convolutions with a core tensor of the kernel's size
    use_scalar: bool = False  # a trained factor that starts at 0, in place of a matrix of zeros
    rs_lora: bool = False  # alpha is divided by the root of the rank (arXiv:2312.03732)
    dora_wd: bool = False  # weight decomposition, DoRA (arXiv:2402.09353)
    wd_on_output: bool = True  # its magnitudes are those of rows; else of columns
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced_factorization: bool = False
    train_on_input: bool = False  # (IA)^3 scales input channels

    @classmethod
    def read(cls, reader: Reader) -> ChangeArgs:
        return cls(**{name: _CHANGE_READERS[name](reader) for name in cls.NAMES})


def _flag(name: str, default: bool = False) -> Callable[[Reader], bool]:
    return lambda reader: reader.flag(name) if reader.args.get(name, "").strip() else default


def _share(name: str, **limits: float) -> Callable[[Reader], float | None]:
    return lambda reader: reader.number(name, float, least=0, **limits)


_CHANGE_READERS: dict[str, Callable[[Reader], Any]] = {
    "dropout": _share("dropout", most=1),
    "rank_dropout": _share("rank_dropout", below=1),
    "module_dropout": _share("module_dropout", most=1),
    "wd_on_output": _flag("wd_on_output", default=True),
    "factor": lambda reader: reader.number("factor", int, least=-1) or -1,
    **{
        name: _flag(name)
        for name in (
            *("rank_dropout_scale", "use_tucker", "use_scalar", "rs_lora", "dora_wd"),
            *("decompose_both", "full_matrix", "unbalanced_factorization", "train_on_input"),
        )
    },
}


@dataclass(frozen=True)
class LohaArgs(ChangeArgs):
    """`rank_dropout` always divides the rows that are kept."""

    NAMES = ("use_tucker", "rank_dropout", "module_dropout")

    rank_dropout_scale: bool = True


@dataclass(frozen=True)
class LokrArgs(LohaArgs):
    """As `LohaArgs`, with the factor."""

    NAMES = (*LohaArgs.NAMES, "factor")


_DROPOUTS = ("dropout", "rank_dropout", "rank_dropout_scale", "module_dropout")
_DORA = ("use_scalar", "rs_lora", "dora_wd", "wd_on_output")


@dataclass(frozen=True)
class LyLoconArgs(ChangeArgs):
    """As LyCORIS has them for LoCon, LoHa and GLoRA."""

    NAMES = (*_DROPOUTS, *_DORA, "use_tucker")


@dataclass(frozen=True)
class LyLokrArgs(ChangeArgs):
    """As LyCORIS has them for LoKr."""

    NAMES = (
        *(*_DROPOUTS, *_DORA, "use_tucker"),
        *("factor", "decompose_both", "full_matrix", "unbalanced_factorization"),
    )


@dataclass(frozen=True)
class WholeArgs(ChangeArgs):
    """Of types without a rank."""

    NAMES = ("rank_dropout", "rank_dropout_scale", "module_dropout", "train_on_input")


@dataclass(frozen=True)
class OftArgs(LayerArgs):
    """`constraint`: of the rotation's norm, by row; 0 limits nothing. `rescaled`: rows have trained factors too."""

    NAMES = ("constraint", "rescaled", "module_dropout")

    constraint: float = 0.0
    rescaled: bool = False
    module_dropout: float | None = None
    listed: bool = False  # blocks have numbers in files even where there is one group of them

    @classmethod
    def read(cls, reader: Reader) -> OftArgs:
        if "constraint" not in cls.NAMES:
            return cls()
        return cls(
            constraint=reader.number("constraint", float, least=0) or 0.0,
            rescaled=reader.flag("rescaled"),
            module_dropout=reader.number("module_dropout", float, least=0, most=1),
        )

    def cut(self, rows: int, rank: int) -> tuple[int, int]:
        """Number and size of the blocks of a layer with that many output rows. Raises: UserError: it is impossible."""
        size, count = factors(rows, rank)
        return count, size

    def rank_of(self, count: int, size: int) -> int:
        """--network_dim of a layer with that many blocks of that size."""
        return size

    def alpha_of(self, alpha: float | None) -> float:
        """What files have as alpha. Args: --network_alpha."""
        return self.constraint

    def of_file(self, tensors: Container[str]) -> Self:
        """The arguments for a layer with these tensors in a file."""
        return replace(self, rescaled="rescale" in tensors)


@dataclass(frozen=True)
class KohyaOftArgs(OftArgs):
    """--network_dim is the number of blocks, --network_alpha the constraint."""

    NAMES = ()

    def cut(self, rows: int, rank: int) -> tuple[int, int]:
        if rows % rank:
            raise UserError(f"its {rows} output rows cannot be cut into {rank} blocks; give another --network_dim")
        return rank, rows // rank

    def rank_of(self, count: int, size: int) -> int:
        return count

    def alpha_of(self, alpha: float | None) -> float:
        return 1e-3 if alpha is None else alpha

    def alpha_warnings(self, alpha: float, module: str) -> list[str]:
        if 0 < alpha < 1:
            return []
        why = f"in {module} it limits how far weights are rotated, which {alpha:g} hardly does"
        return [f"--network_alpha: {why}; 1e-4 to 1e-2 are usual"]


@dataclass(frozen=True)
class NumberedOftArgs(KohyaOftArgs):
    """As `KohyaOftArgs`; blocks have numbers in every file."""

    listed: bool = True


@dataclass(frozen=True)
class InputRotationArgs(LayerArgs):
    """--network_dim is the size of blocks. `auto_adjust`: it may be another where that does not divide the inputs."""

    block_size: int | None = None  # in place of --network_dim
    dropout: float = 0.0  # share of blocks that turn nothing, in training
    auto_adjust: bool = True

    def alpha_warnings(self, alpha: float, module: str) -> list[str]:
        return [] if alpha == 1 else [f"--network_alpha: has no effect in {module}, whose rotations have no scale"]

    @staticmethod
    def shared(reader: Reader, sizes: tuple[str, ...], dropouts: tuple[str, ...]) -> dict[str, Any]:
        """What both types have. Args: the names of arguments that mean the same; the first that is given counts."""
        size = next(filter(None, (reader.number(name, int, least=1) for name in sizes)), None)
        dropout = next(filter(None, (reader.number(name, float, least=0, below=1) for name in dropouts)), 0.0)
        adjust = reader.flag("auto_adjust") if reader.args.get("auto_adjust", "").strip() else True
        return {"block_size": size, "dropout": dropout, "auto_adjust": adjust}


@dataclass(frozen=True)
class InputOftArgs(InputRotationArgs):
    """`coft`: the norm of what rotates a block is at most `coft_eps`. `block_share`: all blocks of a layer are one."""

    NAMES = (
        *("block_size", "oft_block_size", "coft", "oft_coft", "coft_eps", "block_share", "oft_block_share"),
        *("dropout", "dropout_probability", "auto_adjust"),
    )

    coft: bool = False
    coft_eps: float = 6e-5
    block_share: bool = False

    @classmethod
    def read(cls, reader: Reader) -> InputOftArgs:
        return cls(
            **cls.shared(reader, ("block_size", "oft_block_size"), ("dropout", "dropout_probability")),
            coft=reader.flag("coft") or reader.flag("oft_coft"),
            coft_eps=reader.number("coft_eps", float, above=0) or 6e-5,
            block_share=reader.flag("block_share") or reader.flag("oft_block_share"),
        )

    def size(self, width: int, rank: int) -> int:
        """The size of the blocks of that many inputs. Raises: UserError: it does not divide them, and must not vary."""
        size = self.block_size or rank
        if width % size and not self.auto_adjust:
            raise UserError(f"its {width} inputs cannot be cut into blocks of {size}; leave auto_adjust=False out")
        return nearest_divisor(width, size)

    def of_file(self, size: int, *, shared: bool) -> InputOftArgs:
        """The arguments for a layer with blocks of that size in a file."""
        return replace(self, block_size=size, block_share=shared)


@dataclass(frozen=True)
class InputBoftArgs(InputRotationArgs):
    """`block_num`: how many blocks, in place of their size. `stages`: `boft_n_butterfly_factor`."""

    NAMES = (
        *("block_size", "boft_block_size", "block_num", "boft_block_num", "boft_n_butterfly_factor"),
        *("dropout", "boft_dropout", "auto_adjust"),
    )

    block_num: int | None = None
    stages: int = 1

    @classmethod
    def read(cls, reader: Reader) -> InputBoftArgs:
        numbers = (reader.number(name, int, least=1) for name in ("block_num", "boft_block_num"))
        own = cls.shared(reader, ("block_size", "boft_block_size"), ("dropout", "boft_dropout"))
        number = next(filter(None, numbers), None)
        if number and own["block_size"]:
            name = "block_num" if "block_num" in reader.args else "boft_block_num"
            reader.refuse(name, "cannot be used with block_size; give one of the two")
        stages = reader.number("boft_n_butterfly_factor", int, least=1, most=15) or 1
        return cls(**own, block_num=number, stages=stages)

    def shape(self, width: int, rank: int) -> tuple[int, int, int]:
        """Stages, number and size of the blocks of that many inputs. Raises: UserError: there are no such blocks."""

        def fits(size: int) -> bool:
            return self.stages == 1 or (size % 2 == 0 and width // size % 2 ** (self.stages - 1) == 0)

        wanted = self.block_size or rank
        what = f"blocks of {wanted}"
        if self.block_num:
            wanted, what = width // self.block_num, f"{self.block_num} blocks"
        exact = wanted and width % wanted == 0 and (not self.block_num or wanted * self.block_num == width)
        if not (exact and fits(wanted)) and (self.block_num or not self.auto_adjust):
            raise UserError(f"its {width} inputs cannot be cut into {what} for {self.stages} butterfly factors")
        size = nearest_divisor(width, wanted, fits)
        if size is None:
            raise UserError(f"its {width} inputs cannot be cut into blocks for {self.stages} butterfly factors")
        return self.stages, width // size, size
