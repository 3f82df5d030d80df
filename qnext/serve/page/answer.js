// One answer in the conversation: thinking, text, tool calls, and how fast it came.

import { Markdown } from "./markdown.js";
import { count, figure, make, plural, seconds } from "./words.js";

const ENDS = {
  length: "It ends here because it reached the limit of tokens.",
  stopped: "You stopped it here.",
};

export class Answer {
  #said = make("div", "", "said");
  #markdown = new Markdown(this.#said);
  #thinking = make("details", "", "thinking");
  #thought = make("div", "", "thought");
  #summary = make("summary", "Thinking…");
  #figures = make("p", "waiting", "figures");
  #toggled = false; // by the reader, who is then right
  #asked = performance.now();
  #first = null;
  #last = null;
  #thoughtFrom = null;
  #pieces = 0;
  #timer;
  #frames = [];
  text = "";
  reasoning = "";
  calls = [];
  results = null;

  constructor(log) {
    this.node = make("article", "", "answer");
    this.node.setAttribute("aria-label", "Answer");
    this.node.setAttribute("aria-busy", "true");
    this.#summary.addEventListener("click", () => (this.#toggled = true));
    this.#thinking.hidden = true;
    this.#thinking.append(this.#summary, this.#thought);
    this.node.append(this.#thinking, this.#said, this.#figures);
    log.append(this.node);
    this.#timer = setInterval(() => this.#tellSpeed(), 250);
  }

  /** Take what is new from a chunk's `delta`. */
  add(delta) {
    const { content, reasoning_content: thought, tool_calls: calls } = delta;
    if (!content && !thought && !calls) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
    if (thought) {
      this.#thoughtFrom ??= this.#last;
      if (this.#thinking.hidden) {
        this.#thinking.hidden = false;
        this.#thinking.open = true;
      }
      this.reasoning += thought;
      this.#thought.append(thought);
    }
    if ((content && (this.text + content).trim()) || calls) this.#endThinking();
    if (content) {
      this.text += content;
      this.#markdown.feed(content);
    }
    for (const call of calls ?? []) this.#addCall(call);
  }

  /** Nothing more comes. `reason`: OpenAI's word, or `stopped`. */
  finish(reason, { usage = null, timings = null, warnings = [] } = {}) {
    this.#stopClock();
    this.#markdown.finish();
    this.#endThinking();
    for (const { frame, call } of this.#frames) frame.textContent = pretty(call.function.arguments);
    let end = ENDS[reason];
    if (!end && !this.text.trim() && !this.calls.length) end = "The answer has no text.";
    this.#figures.before(...warnings.map((words) => make("p", words, "note")));
    if (end) this.#figures.before(make("p", end, "end"));
    this.#tellSpeed(usage, timings);
  }

  /** Take it from the page. */
  remove() {
    this.#stopClock();
    this.node.remove();
  }

  /** The message that stands for it in the conversation. */
  message() {
    const message = { role: "assistant", content: this.text };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (this.calls.length) message.tool_calls = this.calls;
    return message;
  }

  /** Ask the reader for the results of the calls; `send` gets them as messages. */
  askResults(send) {
    const form = make("form", "", "results");
    const boxes = this.calls.map((call) => {
      const label = make("label", `Result of ${call.function.name}`);
      const box = make("textarea");
      box.rows = 2;
      label.append(box);
      form.append(label);
      return box;
    });
    form.append(make("button", boxes.length === 1 ? "Send result" : "Send results"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send(this.calls.map((call, number) => (
        { role: "tool", tool_call_id: call.id, content: boxes[number].value })));
    });
    this.results = form;
    this.node.append(form);
  }

  #stopClock() {
    clearInterval(this.#timer);
    this.node.removeAttribute("aria-busy");
  }

  #endThinking() {
    if (this.#thoughtFrom === null) return;
    this.#summary.textContent = `Thought for ${seconds((this.#last - this.#thoughtFrom) / 1000)}`;
    if (!this.#toggled) this.#thinking.open = false;
    this.#thoughtFrom = null;
  }

  #addCall({ index, id, function: called }) {
    if (!this.#frames[index]) {
      const call = { id, type: "function", function: { name: called.name, arguments: "" } };
      const box = make("section", "", "call");
      const frame = make("pre");
      frame.tabIndex = 0;
      box.append(make("h3", `Calls ${call.function.name}`), frame);
      this.node.insertBefore(box, this.#figures);
      this.#frames[index] = { frame, call };
      this.calls.push(call);
    }
    const { frame, call } = this.#frames[index];
    call.function.arguments += called.arguments ?? "";
    frame.textContent = call.function.arguments;
  }

  #tellSpeed(usage = null, timings = null) {
    const words = [];
    if (this.#first === null) {
      words.push(`waiting ${seconds((performance.now() - this.#asked) / 1000)}`);
    } else {
      words.push(`first token after ${seconds((this.#first - this.#asked) / 1000)}`);
      const lasted = (this.#last - this.#first) / 1000;
      const told = timings?.predicted_per_second;
      if (told) words.push(`${figure(told)} t/s`);
      else if (lasted > 0) words.push(`about ${figure((this.#pieces - 1) / lasted)} t/s`);
    }
    if (usage) {
      words.push(plural(usage.completion_tokens, "token"));
      const cached = usage.prompt_tokens_details?.cached_tokens;
      const kept = cached ? `, ${count(cached)} of them kept from before` : "";
      words.push(`prompt ${plural(usage.prompt_tokens, "token")}${kept}`);
    }
    this.#figures.textContent = words.join(" · ");
  }
}

/** JSON with its levels one below the other; other text as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
