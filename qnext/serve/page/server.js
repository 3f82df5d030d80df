// The side of the page that tells of the server: state, slots, memory, plan.

import { Failure, getJson, request } from "./api.js";
import { count, make, plural, range, share, size } from "./words.js";

const OFTEN_MS = 1000;
const SELDOM_MS = 5000;
const PARTS = [
  ["weights", "weights"], ["kv", "KV cache"], ["recurrent", "recurrent state"],
  ["compute", "compute buffers"], ["other", "other"],
];
const STATES = { ok: "ready", loading: "loading the model", restarting: "starting again", failed: "failed" };

const at = (id) => document.getElementById(id);

/** Asks the server how it is, often while something is answered, not at all while the page is hidden. */
export class Watch {
  #onNeedsKey;
  #onProps;
  #timer = null;
  #asking = false;
  #again = false;
  #props = null;
  #busy = false;

  constructor({ onNeedsKey, onProps }) {
    this.#onNeedsKey = onNeedsKey;
    this.#onProps = onProps;
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
  }

  /** Whether an answer is under way. */
  set busy(busy) {
    this.#busy = busy;
    this.look();
  }

  /** Ask now, and from now on. */
  async look() {
    clearTimeout(this.#timer);
    if (this.#asking) {
      this.#again = true;
      return;
    }
    this.#asking = true;
    let wait = SELDOM_MS;
    try {
      wait = (await this.#ask()) || this.#busy ? OFTEN_MS : SELDOM_MS;
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      this.#props = null; // another server may answer next
      if (error.status === 401) this.#onNeedsKey();
      this.#say(error.status === 401 ? "asks for an API key" : error.message, "bad");
    } finally {
      this.#asking = false;
      if (this.#again) wait = 0;
      this.#again = false;
      if (!document.hidden) this.#timer = setTimeout(() => this.look(), wait);
    }
  }

  /** True where something happens that is worth a look soon. */
  async #ask() {
    const health = await this.#health();
    if (health.status !== "ok") {
      this.#props = null;
      const far = health.progress === undefined ? "" : ` ${share(health.progress)}`;
      const why = health.why && health.status !== "loading" ? `: ${health.why}` : "";
      this.#say(`${STATES[health.status] ?? health.status}${far}${why}`, health.status === "failed" ? "bad" : "");
      return health.status !== "failed";
    }
    if (this.#props === null) {
      this.#props = await getJson("props");
      showProps(this.#props);
      this.#onProps(this.#props);
    }
    const [slots, metrics] = await Promise.all([getJson("slots"), this.#metrics()]);
    showSlots(slots, metrics.waiting);
    showCache(metrics);
    const working = slots.filter((slot) => slot.is_processing).length;
    this.#say(working ? `answering, ${working} of ${plural(slots.length, "slot")}` : STATES.ok, "good");
    return working > 0;
  }

  async #health() {
    try {
      return await getJson("health");
    } catch (error) {
      if (error instanceof Failure && error.told?.status) return error.told;
      throw error;
    }
  }

  async #metrics() {
    const text = await (await request("metrics")).text();
    const value = (name) => Number(new RegExp(`^${name} (\\S+)$`, "m").exec(text)?.[1] ?? NaN);
    return {
      waiting: value("llamacpp:requests_deferred"),
      cached: value("qnext:prompt_cache_bytes"),
      budget: value("qnext:prompt_cache_budget_bytes"),
    };
  }

  #say(words, tone) {
    const state = at("state");
    if (state.textContent !== words) state.textContent = words; // what does not change is not read out again
    state.dataset.tone = tone;
  }
}

function showProps(props) {
  const { plan } = props;
  at("model").textContent = props.model_alias;
  document.title = `${props.model_alias} · qnext`;
  at("slots-words").textContent =
    `${plural(props.total_slots, "slot")} of ${plural(props.default_generation_settings.n_ctx, "token")}`;
  at("plan").replaceChildren(...props.plan_in_words.map((words) => make("li", words)));
  at("engine").textContent = props.build_info;
  const { decode_tps: decode, prefill_tps: prefill } = plan.prediction ?? {};
  const forecast = [decode && `decode ${range(decode)}`, prefill && `prefill ${range(prefill)}`].filter(Boolean);
  at("forecast").textContent = forecast.length ? `Forecast: ${forecast.join(", ")}.` : "";
  at("memory").replaceChildren(...(plan.devices ?? []).map(deviceBar));
}

function deviceBar(device) {
  const { name, budget_bytes: budget, total_bytes: total } = device;
  const parts = PARTS.map(([key, words]) => ({ key, words, bytes: device[`${key}_bytes`] }))
    .filter(({ bytes }) => bytes > 0);
  const item = bar(name === "CPU" ? "RAM" : name, `${size(total)} planned of ${size(budget)}`, total, budget,
    parts.map(({ key, bytes }) => [key, bytes]));
  const legend = make("ul", "", "legend");
  legend.append(...parts.map(({ key, words, bytes }) => {
    const entry = make("li", `${words} ${size(bytes)}`);
    entry.prepend(make("span", "", "dot", key));
    return entry;
  }));
  item.append(legend);
  return item;
}

function showSlots(slots, waiting) {
  at("slots").replaceChildren(...slots.map((slot) => {
    const prompt = slot.n_prompt_tokens ?? 0;
    const read = slot.n_prompt_tokens_processed ?? 0;
    const written = slot.n_decoded ?? 0;
    let words = "free";
    if (slot.is_processing) {
      words = read < prompt
        ? `reads ${count(read)} of ${plural(prompt, "token")}`
        : `has written ${plural(written, "token")}`;
    }
    const item = bar(`Slot ${slot.id}`, words, read + written, slot.n_ctx, [["kv", read], ["compute", written]]);
    item.dataset.busy = slot.is_processing;
    return item;
  }));
  if (waiting > 0) at("slots").append(make("li", `${plural(waiting, "request")} waiting`));
}

function showCache({ cached, budget }) {
  const old = at("cache");
  if (!(budget > 0)) {
    old?.remove();
    return;
  }
  const item = bar("Earlier prompts", `${size(cached)} used of ${size(budget)}`, cached, budget, [["kv", cached]]);
  item.id = "cache";
  if (old) old.replaceWith(item);
  else at("memory").append(item);
}

/** A bar of parts, [class, amount] each, out of `whole`. */
function bar(name, words, amount, whole, parts) {
  const item = make("li");
  const title = make("p", "", "bar-title");
  title.append(make("span", name), make("span", words, "soft"));
  const track = make("div", "", "bar");
  track.setAttribute("role", "meter");
  track.setAttribute("aria-label", name);
  track.setAttribute("aria-valuemin", 0);
  track.setAttribute("aria-valuemax", whole);
  track.setAttribute("aria-valuenow", Math.min(amount, whole));
  track.setAttribute("aria-valuetext", words);
  for (const [kind, value] of parts) {
    const part = make("div", "", kind);
    part.style.width = `${(100 * value) / Math.max(whole, amount, 1)}%`;
    track.append(part);
  }
  item.append(title, track);
  return item;
}
