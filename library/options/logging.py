"""Messages on the console, and curves of the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.families.base import FamilyTraits

_WANDB = "Weights & Biases"


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(OptionGroup, group="logging", title="Messages and logs"):
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = opt(
        None, "least importance of messages that are shown; INFO if not given"
    )
    console_log_file: str | None = opt(None, "file that messages go to instead of the console")
    console_log_simple: bool = opt(False, "plain messages without time and level, for consoles such as Colab's")
    logging_dir: str | None = opt(None, "folder for TensorBoard logs, one sub-folder per run")
    log_with: Literal["tensorboard", "wandb", "all"] | None = opt(
        None, "where curves go; tensorboard if only --logging_dir is given"
    )
    log_prefix: str | None = opt(None, "text before the date and time in the name of the run's log folder")
    log_tracker_name: str | None = opt(None, "name of the tracker inside the log folder")
    log_config: bool = opt(False, "write the options into the log, without keys and absolute paths")
    log_tracker_config: str | None = opt(None, "TOML file with settings of trackers", later="tracker settings")
    wandb_run_name: str | None = opt(None, "name of the run at Weights & Biases", later=_WANDB)
    wandb_api_key: str | None = opt(None, "key for Weights & Biases", later=_WANDB, secret=True)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.log_with in ("wandb", "all"):
            yield f"--log_with: not available yet ({_WANDB}), got {self.log_with}; use tensorboard"
        if self.log_with in ("tensorboard", "all") and not self.logging_dir:
            yield f"--log_with: {self.log_with} needs --logging_dir, the folder to write to"

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.logging_dir:
            for name in ("log_prefix", "log_tracker_name", "log_config"):
                if getattr(self, name):
                    yield f"--{name}: no effect without --logging_dir"
