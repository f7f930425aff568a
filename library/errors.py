"""The exception for user errors."""

from __future__ import annotations

from library.screen import shown, without_secrets


class UserError(Exception):
    """A mistake in options, files or data. `cli.run` shows it without a traceback and exits with status 2.

    Each problem is one line that says what is wrong, where, and what to do; all that are known are given at once.
    """

    def __init__(self, *problems: str, hint: str | None = None):
        self.problems = tuple(map(without_secrets, problems))
        self.hint = hint
        super().__init__("\n".join(self.problems))

    def render(self) -> str:
        """The text for the screen: a line for each problem."""
        lines = list(map(shown, self.problems))
        if len(lines) == 1:
            text = f"error: {lines[0]}"
        else:
            text = f"error: {len(lines)} problems\n" + "\n".join(f"  {line}" for line in lines)
        return text if self.hint is None else f"{text}\n  hint: {shown(self.hint)}"


class NameTooLongError(UserError):
    """A file beside one image cannot be written, for the length of its name; those beside others can."""
