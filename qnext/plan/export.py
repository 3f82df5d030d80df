"""A plan in the words of other programs, each with what those words cannot say.

Pure text: nothing is started or looked up. A path may hold anything a file name may (spaces, quotes, `$`,
`%`, any script), and every format has its own way of keeping it whole; what none can hold on one line (line
breaks, control characters, undecodable bytes) is refused. Formats with a comment syntax carry their notes as
comments; shell lines carry none, because a pasted `#` line is an error in some shells.
"""

from __future__ import annotations

import shlex
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qnext.errors import UsageError
from qnext.plan.export_apps import lmstudio_notes, ollama_env
from qnext.plan.export_docker import docker_words
from qnext.plan.flags import server_warnings
from qnext.plan.plan import Plan
from qnext.plan.values import HOST
from qnext.units import format_bytes

TextFormat = Literal[
    "argv", "llama-server", "llama-swap", "systemd", "docker", "ollama-env", "lmstudio-notes"
]
TEXT_FORMATS: tuple[TextFormat, ...] = get_args(TextFormat)
"""The formats made here; `json` and `yaml` are the whole plan, which carries its own warnings."""

COMMENT_WIDTH = 76

_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that end a line somewhere or are no character: controls, surrogates, separators."""


_NO_CHARACTERS = "\ufffe\uffff"
"""What YAML does not take."""


@dataclass(frozen=True, slots=True)
class Export:
    """`text` ends in a line break. `notes` say what it does not; `commented`: they are in it already."""

    text: str
    notes: tuple[str, ...]
    commented: bool


def export_plan(plan: Plan, to: TextFormat, *, model: str, serve: Sequence[str] = ()) -> Export:
    """The plan for one program.

    `model` is the absolute path of the model file, because most of these programs run elsewhere than here;
    `serve` is the command that a unit file starts: the program, `serve`, and the wishes that the plan was
    made of. Raises UsageError for a path that cannot be written on one line, and for a plan that the program
    has no way to run.
    """
    argv = list(plan.argv)
    argv[argv.index("-m") + 1] = model
    for word in (*argv, *serve):
        _require_plain(word)
    unsaid = server_warnings(plan.placement)
    makers: dict[TextFormat, Callable[[], Export]] = {
        "argv": lambda: Export("".join(f"{word}\n" for word in argv), unsaid, False),
        "llama-server": lambda: _shell(argv, unsaid),
        "llama-swap": lambda: _llama_swap(plan, argv),
        "systemd": lambda: _systemd(plan, serve or ("qnext", "serve", model)),
        "docker": lambda: _docker(plan, argv),
        "ollama-env": lambda: _commented(*ollama_env(plan, model)),
        "lmstudio-notes": lambda: _commented(*lmstudio_notes(plan)),
    }
    return makers[to]()


def _shell(words: Sequence[str], notes: Sequence[str], raw: Sequence[str] = ()) -> Export:
    """A command for a POSIX shell, a flag with its value per line. Words of `raw` stay unquoted."""
    lines = flag_lines([word if word in raw else shlex.quote(word) for word in words])
    return Export(" \\\n  ".join(lines) + "\n", tuple(notes), False)


def flag_lines(words: Sequence[str]) -> list[str]:
    """Quoted words joined by blanks: the program, then a line for each flag with its value, if it has one."""
    lines: list[list[str]] = [[]]
    for word in words:
        last = lines[-1]
        if word.startswith("-") or (len(lines) > 1 and len(last) == 2):
            lines.append([word])
        else:
            last.append(word)
    return [" ".join(line) for line in lines]


def _commented(body: str, notes: Sequence[str]) -> Export:
    """`body` below its notes as `#` lines."""
    lines = [
        textwrap.wrap(note, COMMENT_WIDTH, break_long_words=False, break_on_hyphens=False) for note in notes
    ]
    head = "".join(
        f"# {'  ' if number else ''}{line}\n" for note in lines for number, line in enumerate(note)
    )
    return Export(head + body, tuple(notes), True)


def _llama_swap(plan: Plan, argv: Sequence[str]) -> Export:
    """An entry of llama-swap's configuration, which adds the port.

    It splits `cmd` as a shell would, over several lines, after dropping lines that begin with `#` and
    replacing its macros `${NAME}`; an unknown macro is an error, so a `${` of ours is split between quotes.
    """
    words = [shlex.quote(word).replace("${", "$''{") for word in argv]
    lines = [*flag_lines(words), "--port ${PORT}"]
    name = " ".join(filter(None, (plan.shape.name or plan.model_ref, plan.shape.quant)))
    body = [
        "models:",
        f"  {_yaml_string(name)}:",
        "    cmd: |",
        *(f"      {line}" for line in lines),
    ]
    notes = (
        "an entry for the models of llama-swap's config.yaml",
        *server_warnings(plan.placement),
        "memory is planned for this model alone: llama-swap must not run another one beside it",
        "large files load slowly: where it takes longer than 2 minutes, raise healthCheckTimeout",
    )
    return _commented("".join(f"{line}\n" for line in body), notes)


def _yaml_string(text: str) -> str:
    """A double-quoted YAML scalar."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{"".join(_yaml_escape(one) for one in escaped)}"'


def _yaml_escape(character: str) -> str:
    plain = unicodedata.category(character) not in _UNPRINTABLE and character != "\ufeff"
    return character if plain else f"\\U{ord(character):08x}"


def _systemd(plan: Plan, serve: Sequence[str]) -> Export:
    """A unit that starts `qnext serve`; the same text serves as a user's unit and as the system's.

    The server plans again when it starts, from the same wishes, so that it fits the machine as it is then.
    `KillMode=mixed`: the signal to stop goes to it alone, which then lets the engine finish its answers.
    """
    lines = flag_lines([systemd_word(serve[0], program=True), *map(systemd_word, serve[1:])])
    host = next(device for device in plan.devices if device.name == HOST)
    description = (plan.shape.name or plan.model_ref).replace("%", "%%")
    locks = "mlock" in plan.placement.load_mode
    body = [
        "[Unit]",
        f"Description=qnext serve: {''.join(one for one in description if one.isprintable())}",
        "After=network.target",
        "",
        "[Service]",
        "Type=exec",
        "ExecStart=" + " \\\n  ".join(lines),
        "KillMode=mixed",
        "Restart=on-failure",
        "RestartSec=10",
        *(["LimitMEMLOCK=infinity"] if locks else []),
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    notes = [
        "save as ~/.config/systemd/user/qnext.service, then: systemctl --user enable --now qnext",
        "it plans anew at each start, with what is asked for here; --host and --port may be added",
        "a key for callers stands in a file that only you can read, with a line QNEXT_API_KEY=…, named here: "
        "EnvironmentFile=%h/.config/qnext/key",
        f"MemoryMax= is not set: the plan holds {format_bytes(host.total_bytes)} of RAM, and a limit that is "
        "reached ends the server",
    ]
    if locks:
        notes.append(
            "LimitMEMLOCK= cannot raise a user's own limit: where that is low, install the unit in "
            "/etc/systemd/system, with User="
        )
    return _commented("".join(f"{line}\n" for line in body), notes)


def systemd_word(word: str, *, program: bool = False) -> str:
    """One word of ExecStart=, as systemd.service(5) ("Command lines") and systemd.syntax(7) read it.

    `%` begins a specifier and `$` a variable, inside quotes too; the program itself knows no variables.
    """
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if not program:
        escaped = escaped.replace("$", "$$")
    plain = bool(word) and all(one.isalnum() or one in "-_./=:,+" for one in word)
    return word if plain else f'"{escaped}"'


def _docker(plan: Plan, argv: Sequence[str]) -> Export:
    words, raw, notes = docker_words(plan.placement, argv)
    return _shell(words, (*notes, *server_warnings(plan.placement)), raw)


def _require_plain(word: str) -> None:
    if any(unicodedata.category(one) in _UNPRINTABLE or one in _NO_CHARACTERS for one in word):
        raise UsageError(
            f"{word!r} holds a character that this format cannot",
            hint="Use --format json, or give the file a name without line breaks and control characters.",
        )
