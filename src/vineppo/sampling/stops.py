"""Find the tokens that may complete a stop string, so that only these are checked while tokens are decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vineppo.model.codec import Codec

_UNREADABLE = "�"
"""The decoder writes this for bytes that are not whole characters."""


class StopTokens:
    """For sets of stop strings, the tokens that may complete one of them.

    Args:
        codec: decodes token ids.
        size: number of token ids.
    """

    def __init__(self, codec: Codec, size: int):
        self.codec, self.size = codec, size
        self._texts: list[str] | None = None
        self._tables: dict[tuple[str, ...], np.ndarray] = {}

    def table(self, stop: Sequence[str]) -> np.ndarray:
        """Return for each token id whether it may complete one of the strings: bytes of shape (size,).

        A token may complete a string if its text contains the string's last character, or if its text is unknown on its
        own: a part of a character, or nothing. If one of the strings is empty, every token may.
        """
        key = tuple(stop)
        if key not in self._tables:
            last = {text[-1:] for text in stop}
            self._tables[key] = np.array(
                [
                    not text or "" in last or _UNREADABLE in text or bool(last & set(text))
                    for text in self._token_texts()
                ],
                np.uint8,
            )
        return self._tables[key]

    def _token_texts(self) -> list[str]:
        """Return the text of each token behind another token. Some decoders drop a space at the start of a text."""
        if self._texts is None:
            self._texts = [self._text(i) for i in range(self.size)]
        return self._texts

    def _text(self, token: int) -> str:
        try:
            alone, twice = self.codec.decode((token,)), self.codec.decode((token, token))
        except (IndexError, KeyError, OverflowError):
            return ""
        # What the second of two tokens adds; everything if the decoder joins them in another way.
        return alone + twice[len(alone) :]
