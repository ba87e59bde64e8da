"""Replace names of settings in error messages by the names of the fields and arguments that a trainer has for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from vineppo.config.trl_fields import FIELD_OF
from vineppo.types import UserError


class FieldNames:
    """Replaces the names of settings in messages.

    Args:
        changed: setting -> field, where the field that determines the setting differs from `FIELD_OF`.
        kept: settings that the user gave by their dotted keys; their names are not replaced.
    """

    def __init__(self, changed: Mapping[str, str], kept: Collection[str]) -> None:
        self.field_of = {key: name for key, name in {**FIELD_OF, **changed}.items() if key not in kept}
        keys = "|".join(re.escape(key) for key in sorted(self.field_of, key=len, reverse=True) if key != "algorithm")
        self._pattern = re.compile(rf"(?<![\w./])(?:--)?({keys})(?![\w/]|\.\w)")

    def translate(self, message: str) -> str:
        """Return a message with the names of fields in place of the names of settings and options."""
        message = re.sub(r"--resume \S+", "resume_from_checkpoint=True", message)
        message = message.replace("remove those options", "restore the old values")
        return self._pattern.sub(lambda match: self.field_of[match[1]], message)

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Translate the message of every UserError that is raised in the block."""
        try:
            yield
        except UserError as error:
            message = self.translate(str(error))
            if message == str(error):
                raise
            raise UserError(message) from error.__cause__
