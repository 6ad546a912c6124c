"""Prompt cleaning and tokenization, as in the official code (spec section 3.2)."""

from __future__ import annotations

import html

from lowvram.errors import CheckpointError

END = "</s>"


def clean_prompt(text: str) -> str:
    """Clean a prompt: ftfy, unescape HTML entities twice, collapse and strip white space.

    Case and punctuation are kept.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """UMT5 tokenizer from the bytes of the model's `tokenizer.json`.

    The constructor raises `CheckpointError` for invalid bytes or a tokenizer without `</s>`.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        except Exception as error:  # the library raises bare `Exception`
            raise CheckpointError(
                f"cannot read tokenizer.json ({_one_line(error)}): copy it again from the model"
            ) from error
        end = self._tokenizer.token_to_id(END)
        if end is None:
            raise CheckpointError(
                f"tokenizer.json has no token {END}, so it is not UMT5's: copy it again from the "
                f"model"
            )
        self.end_id = int(end)
        # Ignore the padding and truncation settings of the file.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, prompt: str, text_len: int) -> list[int]:
        """Token ids of the cleaned prompt and `</s>`, truncated to `text_len` in total."""
        ids = self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids
        return [*ids[: text_len - 1], self.end_id]

    def length(self, prompt: str) -> int:
        """Number of tokens of the cleaned prompt and `</s>`, without truncation."""
        return len(self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids) + 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
