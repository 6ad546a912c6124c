"""From a prompt to token ids, as the official code does it (spec section 3.2)."""

from __future__ import annotations

import html

from lowvram.errors import CheckpointError

END = "</s>"


def clean_prompt(text: str) -> str:
    """ftfy, HTML entities unescaped twice, every run of white space one space, none at the ends;
    case and punctuation stay.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """The model's own `tokenizer.json`. Raises `CheckpointError` where the bytes are not one, or
    know no `</s>`.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        except Exception as error:  # the library raises bare `Exception`
            raise CheckpointError(
                f"cannot read tokenizer.json ({_one_line(error)}): take the file of the model again"
            ) from error
        end = self._tokenizer.token_to_id(END)
        if end is None:
            raise CheckpointError(
                f"tokenizer.json has no token {END}, so it is not the one of UMT5: take the file "
                f"of the model again"
            )
        self.end_id = int(end)
        self._tokenizer.no_padding()  # both would come from the file, with lengths of its own
        self._tokenizer.no_truncation()

    def encode(self, prompt: str, text_len: int) -> list[int]:
        """Ids of the cleaned prompt and then of `</s>`, at most `text_len` in all; an empty prompt
        gives `</s>` alone.
        """
        ids = self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids
        return [*ids[: text_len - 1], self.end_id]

    def length(self, prompt: str) -> int:
        """Tokens of the whole prompt with its `</s>`; more than `text_len` means that `encode`
        cuts.
        """
        return len(self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids) + 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
