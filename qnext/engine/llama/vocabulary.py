"""A model's tokens: from text, to text, and which of them are special."""

from __future__ import annotations

import ctypes
from typing import Any

from qnext.engine.llama.binding import EngineFailure, llama


class Vocabulary:
    """The vocabulary of an open `model`, with which it must not be used any longer than that is open."""

    def __init__(self, model: Any) -> None:
        lib = llama()
        self.handle = lib.llama_model_get_vocab(model)
        self.size: int = lib.llama_vocab_n_tokens(self.handle)
        self.bos: int = lib.llama_vocab_bos(self.handle)
        self.eos: int = lib.llama_vocab_eos(self.handle)
        self._adds_bos = bool(lib.llama_vocab_get_add_bos(self.handle))

    def adds_bos_to(self, text: str) -> bool:
        """Whether a beginning-of-sequence token goes before `text`: not when a template has written it."""
        return self._adds_bos and not (self.bos >= 0 and text.startswith(self.text(self.bos)))

    def text(self, token: int) -> str:
        """The token as the vocabulary writes it, empty for -1 (there is no such token)."""
        if token < 0:
            return ""
        text: bytes = llama().llama_vocab_get_text(self.handle, token)
        return text.decode(errors="replace")

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        """Token ids of `text`; with `special`, control tokens written out in it count as such."""
        lib = llama()
        raw = text.encode(errors="replace")  # half a surrogate pair is no character
        size = len(raw) + 8
        array = (lib.llama_token * size)()
        count = lib.llama_tokenize(self.handle, raw, len(raw), array, size, add_bos, special)
        if count < 0:
            raise EngineFailure("tokenize", "llama.cpp could not tokenise the text")
        return list(array[:count])

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for, maybe a part of a character; control tokens only with `special`."""
        lib = llama()
        buffer = ctypes.create_string_buffer(256)
        length = lib.llama_token_to_piece(self.handle, token, buffer, len(buffer), 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = lib.llama_token_to_piece(self.handle, token, buffer, len(buffer), 0, special)
        return buffer.raw[:length]

    def ends_generation(self, token: int) -> bool:
        """Whether the model says with this token that it is done."""
        return bool(llama().llama_vocab_is_eog(self.handle, token))

    def enders(self) -> list[int]:
        """All tokens that end a generation."""
        is_ender = llama().llama_vocab_is_eog
        return [token for token in range(self.size) if is_ender(self.handle, token)]

    def is_control(self, token: int) -> bool:
        """Whether a token is no text but a sign to the model."""
        return bool(llama().llama_vocab_is_control(self.handle, token))

    def suppressed(self) -> list[int]:
        """Tokens that the model's file says are never to be chosen."""
        count = ctypes.c_int32()
        array = llama().llama_vocab_get_suppress_tokens(self.handle, ctypes.byref(count))
        return list(array[: count.value]) if array else []
