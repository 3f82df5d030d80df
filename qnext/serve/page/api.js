// Requests to the server that this page came from; nothing else is ever asked.

const KEY = "qnext-api-key";

/** What the server, or the way to it, answered instead of what was asked for. */
export class Failure extends Error {
  constructor(message, { status = null, retryAfterS = null, told = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
    this.told = told;
  }
}

/** Keep the key for this tab, until it is closed. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The answer to a request, of which only the headers are read. Throws Failure, or AbortError when stopped. */
export async function request(path, { body = null, signal = null } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== null) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === null ? "GET" : "POST",
      body: body === null ? undefined : JSON.stringify(body),
      headers, signal, cache: "no-store", credentials: "omit", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Does it still run?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** The JSON that the server tells under `path`. */
export async function getJson(path) {
  return (await request(path)).json();
}

async function failure(response) {
  let told = null;
  try {
    told = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  const message = told?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new Failure(message, {
    status: response.status, retryAfterS: Number.isNaN(seconds) ? null : seconds, told,
  });
}

/** Server-sent events of a response as values, until `[DONE]`. Throws Failure where they break off. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      read = { done: true };
    }
    if (read.done) throw new Failure("The connection broke off before the answer had come to its end.");
    const parts = (rest + read.value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data:")) continue; // a comment that keeps the connection open
      const data = part.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message);
      yield event;
    }
  }
}
