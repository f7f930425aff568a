"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in options, files or data. `cli.run` shows it without a traceback and exits with status 2.

    Each problem is one line that says what is wrong, where, and what to do; all that are known are given at once.
    """

    def __init__(self, *problems: str, hint: str | None = None):
        super().__init__("\n".join(problems))
        self.problems = problems
        self.hint = hint

    def render(self) -> str:
        if len(self.problems) == 1:
            text = f"error: {self.problems[0]}"
        else:
            text = f"error: {len(self.problems)} problems\n" + "\n".join(f"  {line}" for line in self.problems)
        return text if self.hint is None else f"{text}\n  hint: {self.hint}"


class NameTooLongError(UserError):
    """A file beside one picture cannot be written, for the length of its name; those beside others can."""
