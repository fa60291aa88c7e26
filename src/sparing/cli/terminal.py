"""A chat at a terminal, or through pipes: a line is a message, or a command that begins with a slash."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from sparing.base.config import UserError
from sparing.base.config_file import nearest
from sparing.base.messages import say

if TYPE_CHECKING:
    from sparing.api import Chat

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT: begin anew with this as the system's message; without TEXT: with none of your own",
    "/help": "these commands; a message that begins with a slash is written with two",
    "/quit": "leave (Ctrl-D too; Ctrl-C stops an answer)",
}
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that change a terminal's state, or the order in which it shows others: control characters but tab and newline (ECMA-48's
C0 and C1), and Unicode's marks of direction."""


def harmless(text: str) -> str:
    """`text` with each character that a terminal would obey written as its escape."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def messages(interactive: bool) -> Iterator[str]:
    """Lines of standard input, without their ends, until it ends. Raises UserError for a line that is not UTF-8."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives `input` a history and editing keys
        with suppress(EOFError):
            while True:
                try:
                    line = input("> ")
                    line.encode()  # where there is no locale, a byte that is not UTF-8 comes as a lone surrogate
                except UnicodeError:
                    say("sparing: this line is not UTF-8 text")
                else:
                    yield line
        print()
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError(f"line {number} of standard input is not UTF-8 text") from None


def converse(chat: Chat, write_turn: Callable[[dict], None] | None = None) -> None:
    """Answer lines of standard input until they end. write_turn: given each turn, instead of showing its answer while it is written."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and write_turn is None
    if interactive:
        say("type a message; /help lists the commands")
    for line in messages(interactive):
        text = line.strip()
        if not text:
            continue
        if text.startswith("/") and not text.startswith("//"):
            if not _obeyed(chat, text):
                return
            continue
        text = text[1:] if text.startswith("//") else text
        try:
            turn = chat.ask(text, _show if write_turn is None else lambda piece: None)
        except UserError as error:  # of this message alone
            say(f"sparing: {error}")
            if write_turn:
                write_turn({"message": text, "error": str(error)})
            continue
        if write_turn:
            write_turn({"message": text, **turn})
        else:
            print(" [stopped]" if turn["finish_reason"] == "cancelled" else "", flush=True)
            if turn["finish_reason"] == "length":
                say("(the answer was cut: --max-tokens, or the context is full)")


def _show(piece: str) -> None:
    print(harmless(piece), end="", flush=True)


def _obeyed(chat: Chat, text: str) -> bool:
    """Do what a command says. False: leave."""
    command, _, rest = text.partition(" ")
    match command:
        case "/quit":
            return False
        case "/reset":
            chat.conversation.reset()
        case "/system":
            chat.conversation.system = rest.strip() or None
            chat.conversation.reset()
        case "/help":
            for name, does in COMMANDS.items():
                say(f"  {name:8} {does}")
        case _:
            say(f"sparing: {harmless(command)}: no such command; nearest: {nearest(command, COMMANDS)}")
    return True
