// The conversation: what was said so far, what is sent, stopping, trying again, the key.

import { Answer } from "./answer.js";
import { Failure, events, request, useKey } from "./api.js";
import { Watch } from "./server.js";
import { make, plural } from "./words.js";

const MOST_TRIES = 10; // that the server asks for by Retry-After
const NEAR_PX = 60;

const at = (id) => document.getElementById(id);
const log = at("log");
const box = at("text");
const settings = at("ask").elements;

let messages = []; // as they are sent; kept nowhere else
let running = null; // AbortController of the answer under way
let pending = null; // the answer whose calls wait for results
let seenTop = 0; // where the log was scrolled to
let following = true; // the newest text stays in view until the reader scrolls up

const watch = new Watch({
  onNeedsKey: () => askForKey(),
  onProps(props) {
    at("key").hidden = true;
    const usual = props.default_generation_settings.params.temperature;
    if (usual !== undefined) settings.temperature.placeholder = String(Math.round(usual * 1000) / 1000);
    at("thinking-field").hidden = !props.chat_template.includes("enable_thinking");
    at("tools-field").hidden = !props.chat_template.includes("tools");
  },
});

// --- asking ----------------------------------------------------------------------------------------

/** Send the conversation with `added` at its end and show the answer. `asked` is what stands in the log. */
async function converse(added, asked) {
  if (running) return;
  const body = readSettings();
  if (body === null) return;
  log.querySelectorAll(".failed").forEach((node) => node.remove());
  asked.forEach((node) => node.classList.remove("failed"));
  pending?.results.remove();
  pending = null;
  at("empty").hidden = true;
  log.append(...asked);
  running = new AbortController();
  const { signal } = running;
  const answer = new Answer(log);
  setBusy(true);
  following = true;
  follow();
  const conversation = messages;
  body.messages = [...settingsMessages(), ...conversation, ...added];
  try {
    const end = await receive(body, answer, signal);
    answer.finish(end.reason, end);
    conversation.push(...added, answer.message());
    if (answer.calls.length) {
      pending = answer;
      answer.askResults((results) => converse(results, []));
    }
    say(answer.calls.length ? "The answer calls tools." : "The answer is complete.");
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (conversation !== messages) answer.remove(); // another one was begun meanwhile
    else if (stopped && (answer.text || answer.reasoning)) {
      answer.calls = []; // maybe cut in the middle
      answer.finish("stopped");
      conversation.push(...added, answer.message());
      say("Stopped.");
    } else {
      giveUp(answer, asked, added, stopped ? "You stopped it before it began." : error.message);
      if (error.status === 401) askForKey();
    }
    if (!stopped && !(error instanceof Failure)) throw error;
  } finally {
    running = null;
    setBusy(false);
    follow();
  }
}

/** The stream into `answer`; how it ended. Waits and asks again as the server says. */
async function receive(body, answer, signal) {
  const response = await requestPatiently(body, answer, signal);
  const end = { reason: null, usage: null, timings: null, warnings: [] };
  for await (const event of events(response)) {
    end.usage = event.usage ?? end.usage;
    end.timings = event.timings ?? end.timings;
    end.warnings.push(...(event.warnings ?? []));
    const choice = event.choices[0];
    if (!choice) continue;
    end.reason = choice.finish_reason ?? end.reason;
    answer.add(choice.delta);
    follow();
  }
  return end;
}

async function requestPatiently(body, answer, signal) {
  const told = make("p", "", "note");
  try {
    for (let tries = 1; ; tries += 1) {
      try {
        return await request("v1/chat/completions", { body, signal });
      } catch (error) {
        if (!(error instanceof Failure) || error.retryAfterS === null || tries === MOST_TRIES) throw error;
        answer.node.prepend(told);
        follow();
        say(`${sentence(error.message)} It is tried again.`);
        for (let left = Math.max(error.retryAfterS, 1); left > 0; left -= 1) {
          told.textContent = `${sentence(error.message)} Trying again in ${plural(left, "second")}.`;
          await pause(1000, signal);
        }
        told.textContent = "Trying again…";
      }
    }
  } finally {
    told.remove();
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}

/** Show what went wrong and a way to try again; what was asked is no part of the conversation then. */
function giveUp(answer, asked, added, message) {
  answer.remove();
  const failed = make("div", "", "failed", "note");
  const words = make("p", sentence(message), "error");
  words.setAttribute("role", "alert");
  const again = make("button", "Try again");
  again.type = "button";
  again.addEventListener("click", () => converse(added, asked));
  failed.append(words, again);
  asked.forEach((node) => node.classList.add("failed"));
  log.append(failed);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

// --- settings --------------------------------------------------------------------------------------

function settingsMessages() {
  const system = settings.system.value.trim();
  return system ? [{ role: "system", content: system }] : [];
}

/** The body without its messages; null where a setting is no good, which is then shown. */
function readSettings() {
  const form = at("ask");
  settings.tools.setCustomValidity("");
  const body = { stream: true, stream_options: { include_usage: true } };
  const { temperature, tokens, thinking, tools } = settings;
  if (temperature.value) body.temperature = temperature.valueAsNumber;
  if (tokens.value) body.max_tokens = tokens.valueAsNumber;
  if (thinking.value) body.chat_template_kwargs = { enable_thinking: thinking.value === "on" };
  if (tools.value.trim() && !at("tools-field").hidden) {
    try {
      body.tools = JSON.parse(tools.value);
    } catch (error) {
      tools.setCustomValidity(`This is not JSON: ${error.message}`);
    }
  }
  if (!form.checkValidity()) {
    at("settings").open = true;
    form.reportValidity();
    return null;
  }
  return body;
}

// --- the page --------------------------------------------------------------------------------------

function setBusy(busy) {
  const buttons = [at("send"), at("stop")];
  if (buttons.includes(document.activeElement)) box.focus(); // before it is gone
  [buttons[0].hidden, buttons[1].hidden] = [busy, !busy];
  watch.busy = busy;
}

function say(words) {
  at("said").textContent = words;
}

function follow() {
  if (following) requestAnimationFrame(() => (log.scrollTop = log.scrollHeight));
}

function grow() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`;
}

function askForKey() {
  const form = at("key");
  if (form.hidden) {
    form.hidden = false;
    at("key-text").focus();
  } else if (form.dataset.used && at("key-error").hidden) {
    at("key-error").hidden = false;
    at("key-error").textContent = "The server does not accept this key.";
  }
}

function stop() {
  running?.abort();
}

log.addEventListener("scroll", () => {
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  if (near || log.scrollTop < seenTop) following = near; // only a move up is the reader's for sure
  seenTop = log.scrollTop;
});
new ResizeObserver(follow).observe(log);
box.addEventListener("input", grow);
settings.tools.addEventListener("input", () => settings.tools.setCustomValidity(""));
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) at("ask").requestSubmit(at("send"));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
at("stop").addEventListener("click", stop);
at("ask").noValidate = true; // readSettings checks, and opens what is folded first
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = box.value.trim();
  if (!text || running) return;
  const shown = make("article", text, "question");
  shown.setAttribute("aria-label", "You");
  const before = box.value;
  box.value = "";
  grow();
  converse([{ role: "user", content: text }], [shown]);
  if (!running) box.value = before; // a setting was no good
});
at("new").addEventListener("click", () => {
  stop();
  messages = [];
  pending = null;
  log.querySelectorAll("article, .failed").forEach((node) => node.remove());
  at("empty").hidden = false;
  box.focus();
});
at("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(at("key-text").value.trim());
  at("key").dataset.used = "yes";
  at("key-error").hidden = true;
  await watch.look();
});

const wide = matchMedia("(min-width: 900px)");
const unfold = () => (at("server").open = wide.matches);
wide.addEventListener("change", unfold);
unfold();
if (wide.matches) box.focus(); // on a telephone that would bring up the keyboard
watch.look();
