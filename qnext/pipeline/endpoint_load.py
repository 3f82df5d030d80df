"""One server made ready for load: get to know it, make prompts of the wanted length, count what it does not.

First contact finds out which fields the server takes, by asking with all of them and then with fewer. Two or
three short requests show how many tokens a word makes. Prompts are made and tokens counted outside the time
that is measured.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from qnext.bench.endpoint import CountSource, Exchange
from qnext.bench.endpoint_result import EndpointServer, display_name
from qnext.bench.prompts import Length, PromptMaker, fit_length
from qnext.errors import ModelError, QnextError, UsageError
from qnext.pipeline.endpoint_client import Answer, Dialect, EndpointClient, check_address
from qnext.pipeline.endpoint_errors import NO_SUCH_PLACE, explain

WARM_UP_TOKENS = 16
_CONTACT_TOKENS = 16
_PROBE_WORDS = (16, 80)
_ROUND_TRIPS = 9
_FITTING_ROUNDS = 16
_DRAWN_AGAIN = 3
_NOT_UNDERSTOOD = (400, 415, 422)


@dataclass(frozen=True, slots=True)
class EndpointTask:
    """What to measure: `repetitions` requests of `prompt` and `generate` tokens by each of the clients.

    `deadline_s` is how long one request may take. `api_key_env` names the environment variable with the key.
    """

    url: str
    model: str | None = None
    concurrency: tuple[int, ...] = (1,)
    prompt: int = 512
    generate: int = 128
    repetitions: int = 5
    api_key_env: str | None = None
    deadline_s: float = 600.0


def make_client(task: EndpointTask) -> EndpointClient:
    """A client of the task's server. Raises UsageError for an address or a key that will not do."""
    return EndpointClient(
        check_address(task.url),
        model=task.model,
        api_key=_read_key(task.api_key_env),
        deadline_s=task.deadline_s,
    )


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"the environment variable {name} {'holds no usable key' if key else 'is not set'}",
            hint=f"Set it to the server's key: export {name}=…",
        )
    return key


async def get_to_know(client: EndpointClient, task: EndpointTask, maker: PromptMaker) -> ServerLoad:
    """First contact, round trips and prompt length; raises as `measure_endpoint` says."""
    listing, software = await _list_models(client, task)
    client.model = task.model or _only_model(listing, client.url)
    first = await _agree(client, task, listing)
    round_trips = [await _round_trip_ns(client) for _ in range(_ROUND_TRIPS + 1)][1:]
    server = EndpointServer(
        url=client.url,
        software=software,
        model=display_name(first.model or client.model),
        build=first.build,
        api=client.dialect.api,
        extras=client.dialect.extras,
        usage=first.exchange.output_tokens is not None,
    )
    load = ServerLoad(client, task, maker, server, tuple(round_trips))
    await load.learn_length()
    return load


def _explained(one: Exchange, client: EndpointClient, task: EndpointTask) -> QnextError:
    return explain(one, client.url, task.api_key_env)


async def _list_models(client: EndpointClient, task: EndpointTask) -> tuple[list[str], str | None]:
    """Names of the models served, empty where the server does not tell, and its Server header."""
    exchange, found, software = await client.get("/models")
    if exchange.http_status in NO_SUCH_PLACE:
        return [], software
    if exchange.status == "foreign-server" and task.model is not None:
        return [], software
    if exchange.status != "ok":
        raise _explained(exchange, client, task)
    entries = found.get("data") if isinstance(found, dict) else None
    names = [one.get("id") for one in entries if isinstance(one, dict)] if isinstance(entries, list) else None
    if names is None and task.model is None:
        odd = replace(exchange, status="foreign-server", error="its /models is not a list of models")
        raise _explained(odd, client, task)
    return [name for name in names or [] if isinstance(name, str)], software


def _only_model(names: list[str], url: str) -> str | None:
    if len(names) > 1:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise UsageError(
            f"the server at {url} has {len(names)} models: {shown}",
            hint=f"Name one: qnext bench run --url {url} {names[0]}",
        )
    return names[0] if names else None


async def _agree(client: EndpointClient, task: EndpointTask, names: list[str]) -> Answer:
    """The first answer, in the richest dialect that the server takes. `client.dialect` is left at it."""
    refusals: list[Exchange] = []
    for api in ("chat", "completions"):
        for extras, usage in ((True, True), (False, True), (False, False)):
            client.dialect = Dialect(api, extras, usage)
            answer = await client.ask("Tell a story.", _CONTACT_TOKENS)
            if answer.exchange.status == "ok":
                return answer
            refusals.append(answer.exchange)
            code = answer.exchange.http_status
            if code in NO_SUCH_PLACE:
                if client.model is not None and names and client.model not in names:
                    raise ModelError(
                        f"the server at {client.url} has no model called '{client.model}'",
                        hint=f"It has: {', '.join(names[:8])}",
                    )
                break
            if code not in _NOT_UNDERSTOOD:
                raise _explained(answer.exchange, client, task)
    told = next((one for one in refusals if one.http_status in _NOT_UNDERSTOOD), refusals[0])
    raise _explained(told, client, task)


async def _round_trip_ns(client: EndpointClient) -> int:
    exchange, _, _ = await client.get("/models")
    return exchange.ended_ns - exchange.sent_ns


@dataclass(slots=True)
class ServerLoad:
    """A server that is known, and all that it takes to load it. `get_to_know` makes one."""

    client: EndpointClient
    task: EndpointTask
    maker: PromptMaker
    server: EndpointServer
    round_trips_ns: tuple[int, ...]
    length: Length = field(default_factory=Length)
    prompt_source: CountSource = "usage"
    output_source: CountSource = "usage"
    _template_tokens: int | None = None
    """What the server's count is above that of `/tokenize`; None without one of them."""

    @property
    def round_trip_ns(self) -> int:
        """The median time of a trivial request."""
        return round(median(self.round_trips_ns))

    async def learn_length(self) -> None:
        """Measure what words and template come to in tokens, and how prompts will be counted."""
        few, many = [(words, await self._count_prompt(words)) for words in _PROBE_WORDS]
        if not few[1] or not many[1]:
            self.prompt_source = "estimate"
            return
        self.length = fit_length(few, many)
        words = self.length.words_for(self.task.prompt)
        if words > many[0]:
            self.length = fit_length(few, (words, await self._count_prompt(words)))

    async def _count_prompt(self, words: int) -> int:
        """Tokens of a prompt of so many words, 0 if nobody can tell."""
        text = self.maker.text(self.maker.words(words))
        exchange = (await self.client.ask(text, 1)).exchange
        if exchange.http_status != 200:
            raise _explained(exchange, self.client, self.task)
        tokenised = await self.client.count_tokens(text)
        if exchange.prompt_tokens is None:
            self.prompt_source = "tokenize"
            return tokenised or 0
        if tokenised is not None:
            self._template_tokens = exchange.prompt_tokens - tokenised
        return exchange.prompt_tokens

    async def prompt(self) -> str:
        """A fresh prompt; where the server tells its tokens, changed until the length is right.

        The last few words are drawn again too: words are not all of the same tokens, so the count is mostly
        met exactly. Each of `_FITTING_ROUNDS` tries goes on from the nearest so far.
        """
        words = self.maker.words(self.length.words_for(self.task.prompt))
        nearest, short_of = words, self.task.prompt
        for _ in range(_FITTING_ROUNDS if self._template_tokens is not None else 0):
            tokens = await self.client.count_tokens(self.maker.text(words))
            if tokens is None or self._template_tokens is None:
                break
            missing = self.task.prompt - tokens - self._template_tokens
            if abs(missing) < abs(short_of):
                nearest, short_of = words, missing
            if short_of == 0:
                break
            wanted = max(1, len(nearest) + int(short_of / self.length.tokens_per_word))
            kept = nearest[: max(0, min(wanted, len(nearest) - _DRAWN_AGAIN))]
            words = kept + self.maker.words(wanted - len(kept))
        return self.maker.text(nearest)

    async def warm_up(self, clients: int, *, first: bool) -> None:
        """A short answer to a prompt of full length for every client, all at once.

        Raises as `measure_endpoint` does when `first` and not one of them worked.
        """
        prompts = [await self.prompt() for _ in range(clients)]
        tokens = min(self.task.generate, WARM_UP_TOKENS)
        answers = await asyncio.gather(*(self.client.ask(prompt, tokens) for prompt in prompts))
        if first and all(answer.exchange.status != "ok" for answer in answers):
            raise _explained(answers[0].exchange, self.client, self.task)

    async def counted(self, seen: Sequence[tuple[str, Answer]]) -> list[Exchange]:
        """The exchanges of prompts and answers, with the tokens counted that the server did not count."""
        return [await self._counted(prompt, answer) for prompt, answer in seen]

    async def _counted(self, prompt: str, answer: Answer) -> Exchange:
        exchange = answer.exchange
        if exchange.status != "ok":
            return exchange
        if exchange.prompt_tokens is None:
            known = await self.client.count_tokens(prompt) if self.prompt_source == "tokenize" else None
            estimate = known or round(len(prompt.split()) * self.length.tokens_per_word)
            exchange = replace(exchange, prompt_tokens=estimate)
        if exchange.output_tokens is None:
            known = await self.client.count_tokens(answer.text)
            self.output_source = "tokenize" if known else "estimate"
            exchange = replace(exchange, output_tokens=known or len(exchange.arrivals_ns))
        return exchange
